"""What a terminal shows, drawn as a picture (SVG).

Well-formed whatever it shows, and with nothing to be fetched.
"""

import html
import io
import re
from collections.abc import Sequence

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.terminal_theme import TerminalTheme

COLUMNS = 92

# Deep water, foam and lamp light; the sixteen colours in the terminal's order.
THEME = TerminalTheme(
    (13, 24, 33),
    (214, 226, 230),
    [(13, 24, 33), (240, 113, 103), (126, 200, 140), (240, 192, 96), (96, 160, 230), (190, 140, 220)]
    + [(88, 196, 208), (214, 226, 230)],
    [(110, 130, 140), (255, 140, 128), (150, 224, 164), (255, 212, 130), (130, 185, 250), (210, 165, 240)]
    + [(120, 220, 230), (255, 255, 255)],
)


def picture_of(shown: Sequence[RenderableType], *, title: str) -> str:
    """The picture of a terminal window called `title`, with `shown` below one another."""
    console = Console(
        record=True,
        file=io.StringIO(),
        width=COLUMNS,
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )
    for each in shown:
        console.print(each)
    return _slim(_legal(console.export_svg(title=title, theme=THEME, code_format=_SVG)))


def _template() -> str:
    """Rich's, in fonts of the reader's own, of a size of its own, and without comments.

    Without a size, a browser gives the picture any. Comments say nothing that is seen, and one with two hyphens in a
    row is an error to every browser.
    """
    template = re.sub(r"\s*@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    template = re.sub(r"\s*<!--.*?-->", "", template, flags=re.DOTALL)
    template = template.replace('viewBox="', 'width="{width}" height="{height}" viewBox="', 1)
    return template.replace("Fira Code, monospace", "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace")


_SVG = _template()
_CHAR_WIDTH = 12.2
"""As rich draws it, in the picture's units."""
_TEXT = re.compile(r'(<text [^>]*?textLength=")[^"]*("[^>]*>)([^<]*)</text>')
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no place for, escaped or not: control characters, halves of pairs, two that are none."""


def _legal(svg: str) -> str:
    """A picture of what a model or a tenant's name may contain, as XML."""
    return _ILLEGAL.sub("\ufffd", svg)


def _slim(svg: str) -> str:
    """Rich's picture without a clip for each line and without blanks, and Chinese characters two columns wide."""
    svg = re.sub(r'\s*<clipPath id="[^"]*-line-\d+">.*?</clipPath>', "", svg, flags=re.DOTALL)
    svg = re.sub(r' clip-path="url\(#[^)"]*-line-\d+\)"', "", svg)

    def text(found: re.Match[str]) -> str:
        shown = html.unescape(found[3])
        if not shown.strip("\xa0\n "):
            return ""
        return f"{found[1]}{cell_len(shown) * _CHAR_WIDTH:g}{found[2]}{found[3]}</text>"

    svg = _TEXT.sub(text, svg)
    return re.sub(r"\n\s*\n", "\n", svg)
