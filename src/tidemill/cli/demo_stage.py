"""How `tidemill demo` looks on a terminal, act by act.

What of it is kept makes the pictures (`demo_picture`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from tidemill.cli.demo_picture import COLUMNS, picture_of
from tidemill.cli.demo_platform import DemoAnswer
from tidemill.cli.output import grouped

FRAMES_PER_S = 12
READING_PAUSE_S = 2.0
"""Between two acts, for the reader at a terminal."""
PANEL_LINES = 6
WIDE_PANEL_LINES = 4
DOTS_IN_A_ROW = 50

ACCENT, GOOD, BAD, QUIET = "bold cyan", "green", "red", "dim"

Justify = Literal["", "left", "right"]


class Act:
    """What is shown under one title, in its final form."""

    def __init__(self, title: str, how: str) -> None:
        self.title = title
        self.how = how
        self.shown: list[RenderableType] = []

    def head(self, number: int | None = None) -> RenderableType:
        """The title, and the command or call that does the same."""
        numbered = self.title if number is None else f"{number} {self.title}"
        return Rule(Text.assemble((numbered, ACCENT), ("  " + self.how, QUIET)), align="left", style=QUIET)


class DemoStage:
    """Shows each thing on the terminal and keeps its final form for the pictures. `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._screen = Console(highlight=False, emoji=False, quiet=quiet)
        width = self._screen.width if self._screen.is_terminal else COLUMNS
        self._screen.width = min(width, COLUMNS)
        self._acts: list[Act] = []
        self._before: list[RenderableType] = []
        """What is shown before the first act."""
        self._after: list[RenderableType] = []
        """What is shown when the acts are over."""
        self._now = self._before

    @property
    def _watched(self) -> bool:
        return self._screen.is_terminal and not self._screen.quiet

    def show(self, what: RenderableType) -> None:
        self._screen.print(what)
        self._now.append(what)

    def live(self, draw: Callable[[], RenderableType], finished: Callable[[], bool]) -> None:
        """Redraw until `finished`, then clear it away: what it came to is for `show`."""
        if not self._watched:
            while not finished():
                time.sleep(0.02)
            return
        with Live(get_renderable=draw, console=self._screen, refresh_per_second=FRAMES_PER_S, transient=True):
            while not finished():
                time.sleep(0.02)

    def title(self, name: str, what: str) -> None:
        self.show(Text.assemble((name, ACCENT), ("  " + what, "bold")))

    def progress(self, text: str) -> None:
        """A passing word on the terminal."""
        self._screen.print(Text(f"· {text}", style=QUIET))

    def say(self, text: str) -> None:
        self.show(Text(text))

    def act(self, title: str, how: str) -> None:
        """Begin an act: its title, and the command or call that does the same."""
        if self._acts and self._watched:
            time.sleep(READING_PAUSE_S)
        self._acts.append(Act(title, how))
        self._now = self._acts[-1].shown
        self._screen.print(Text(), self._acts[-1].head(len(self._acts)), sep="\n")

    def table(self, columns: Sequence[tuple[str, Justify]], rows: Sequence[Sequence[str]]) -> None:
        self.show(_table(columns, rows))

    def page(self, text: str) -> None:
        """A page of plain text, as it was printed."""
        self.show(Text(text, no_wrap=True, overflow="crop"))

    def one(self, tenant: str, answer: DemoAnswer, record: Mapping[str, Any] | None) -> RenderableType:
        """A stream in a panel of full width."""
        return _panel(tenant, answer, record, self._screen.width, WIDE_PANEL_LINES)

    def side_by_side(self, streams: Sequence[tuple[str, DemoAnswer, Mapping[str, Any] | None]]) -> RenderableType:
        """Streams in panels beside one another."""
        width = self._screen.width // len(streams)
        return _row([_panel(tenant, answer, record, width, PANEL_LINES) for tenant, answer, record in streams])

    def dots(self, statuses: Sequence[int]) -> RenderableType:
        """A dot for each request: waiting, answered or refused."""
        rows = Text()
        for at, status in enumerate(statuses):
            if at and at % DOTS_IN_A_ROW == 0:
                rows.append("\n")
            sign, style = {0: ("·", QUIET), 200: ("●", GOOD)}.get(status, ("×", BAD))
            rows.append(sign, style)
        return Padding(rows, (0, 0, 0, 2))

    def margin_and_meter(self, margin: Mapping[str, Any], reconciliation: Mapping[str, Any]) -> None:
        """Two panels: what was earned, and whether the meter is right."""
        width = self._screen.width // 2
        self.show(_row([_margin(margin, width), _reconciliation(reconciliation, width)]))

    def verdict(self, claims: Mapping[str, bool], seconds: float) -> None:
        """Each claim, and whether it held."""
        marks = [Text.assemble(("✓ ", GOOD) if holds else ("✗ ", BAD), claim) for claim, holds in claims.items()]
        grid = Table.grid(padding=(0, 2, 0, 0))
        in_a_row = 2 if self._screen.width >= COLUMNS else 1
        for at in range(0, len(marks), in_a_row):
            grid.add_row(*marks[at : at + in_a_row])
        self._now = self._after
        self.show(Text())
        self.show(grid)
        self.progress(f"{seconds} s in all; nothing of it is left behind")

    def save(self, path: Path, *, title: str) -> None:
        """Write all of it as a picture (SVG)."""
        shown = [*self._before]
        for number, act in enumerate(self._acts, 1):
            shown += [Text(), act.head(number), *act.shown]
        path.write_text(picture_of([*shown, *self._after], title=title), encoding="utf-8")

    def save_acts(self, path: Path, numbers: Sequence[int], *, title: str) -> None:
        """Write a few acts, of which the first is number 1, as a picture (SVG)."""
        shown: list[RenderableType] = []
        for number in numbers:
            act = self._acts[number - 1]
            shown += [Text(), act.head(), *act.shown]
        path.write_text(picture_of(shown[1:], title=title), encoding="utf-8")


def _table(columns: Sequence[tuple[str, Justify]], rows: Sequence[Sequence[str]], *, gap: int = 3) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style=QUIET)
    for title, justify in columns:
        table.add_column(title, justify=justify or "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _row(panels: Sequence[RenderableType]) -> RenderableType:
    return Columns(panels, padding=0, expand=False)


def _panel(tenant: str, answer: DemoAnswer, record: Mapping[str, Any] | None, width: int, height: int) -> Panel:
    lines = Text(" ".join(answer.text.split())).wrap(Console(width=width - 4), width - 4)
    body: list[RenderableType] = list(lines[-height:])
    style = ACCENT.removeprefix("bold ")
    footer = f"{answer.pieces} tokens"
    if record is not None:
        counts = f"{record['prompt_tokens']} + {record['completion_tokens']} tokens"
        footer = f"{counts} · {record['charge']} {record['currency']}"
    if answer.error is not None:
        style = BAD
        sentence = str(answer.error["message"]).partition(". ")[0]
        body = [*body[1 - height :], Text(f"{answer.error['code']}: {sentence}.", style=BAD)]
    return Panel(
        Group(*body),
        title=Text(tenant, style="bold"),
        title_align="left",
        subtitle=footer,
        subtitle_align="right",
        border_style=style,
        width=width,
        height=height + 2,
    )


def _margin(margin: Mapping[str, Any], width: int) -> Panel:
    model = margin["models"][0]
    rows = [
        ("revenue", margin["revenue"], margin["currency"]),
        ("cost, busy", "-" + margin["busy_cost"], ""),
        ("cost, idle", "-" + margin["idle_cost"], ""),
        ("gross margin", margin["gross_margin"], _percent(margin["ratio"])),
        *(("revenue in " + code, amount, "") for code, amount in margin["other_currencies"].items()),
    ]
    footer = f"a replica costs {model['cost_per_hour']} {margin['currency']} an hour"
    table = _table([("", ""), ("", "right"), ("", "")], rows)
    table.show_header = False
    return _framed("margin", table, footer, width)


def _percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.0%}"


def _reconciliation(found: Mapping[str, Any], width: int) -> Panel:
    line = found["replicas"][0]
    rows = [
        (what, *(grouped(line[side][f"{what}_tokens"]) for side in ("engine", "metered", "difference")))
        for what in ("prompt", "completion")
    ]
    table = _table([("tokens", ""), ("engine", "right"), ("metered", "right"), ("diff", "right")], rows, gap=2)
    verdict = Text(line["verdict"], style=GOOD if line["verdict"] == "equal" else BAD)
    return _framed("meter reconcile", Group(table, Text(), verdict), f"{line['records']} records", width)


def _framed(title: str, body: RenderableType, footer: str, width: int) -> Panel:
    return Panel(
        body,
        title=Text(title, style="bold"),
        title_align="left",
        subtitle=footer,
        subtitle_align="right",
        border_style=ACCENT.removeprefix("bold "),
        width=width,
        height=7,
    )
