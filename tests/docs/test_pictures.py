"""Each picture of the pages: a browser shows it, and it shows what it is there for."""

import html
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.chromium import document, look
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # a browser is started for each picture

PAGES = [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
KINDS = (".svg", ".png")
SVG = "{http://www.w3.org/2000/svg}"
WORDS = {
    "demo.svg": ["海州云", "200 requests at once", "402 insufficient_quota", "AMOUNT DUE CNY", "gross margin", "equal"],
    "demo-short.svg": ["海州云", "200 requests at once", "402 insufficient_quota", "gross margin", "equal"],
}
"""What is to be read in a picture. A picture with no entry fails: say what it is there for."""
WIDEST = 2000
"""Pixels. A page shows no more of them, and a screen neither."""
IN_ONE_SCREEN = 0.65
"""Height by width of the first picture of a README, so that name, commands and picture are seen at once."""


def shown_by(page: Path) -> list[Path]:
    """The pictures that a page shows or links to, in order."""
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|<(?:img|source)\b[^>]*?\bsrc(?:set)?=\"([^\"\s]+)", text)
    named = [one or other for one, other in targets]
    return [(page.parent / name).resolve() for name in named if name.endswith(KINDS) and "://" not in name]


PICTURES = sorted(
    {path for kind in KINDS for path in (ROOT / "docs").rglob(f"*{kind}")}
    | {picture for page in PAGES for picture in shown_by(page)}
)
DRAWN = [picture for picture in PICTURES if picture.suffix == ".svg"]


def text_of(picture: Path) -> str:
    """All text of an SVG, line by line as it is drawn."""
    lines: dict[str, str] = {}
    for text in ElementTree.parse(picture).iter(f"{SVG}text"):
        lines[text.get("y", "")] = lines.get(text.get("y", ""), "") + "".join(text.itertext())
    return "\n".join(lines.values()).replace("\xa0", " ")


def named(picture: Path) -> str:
    return picture.name


def test_there_are_pictures_and_each_is_shown_by_a_page() -> None:
    shown = {picture for page in PAGES for picture in shown_by(page)}
    assert PICTURES
    assert [picture.name for picture in PICTURES if not picture.is_file()] == [], "a page shows what is not there"
    assert [picture.name for picture in PICTURES if picture not in shown] == [], "no page shows it"


@pytest.mark.parametrize("picture", DRAWN, ids=named)
def test_it_is_well_formed_and_has_a_size(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    assert root.tag == f"{SVG}svg"
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert root.attrib["viewBox"].split() == ["0", "0", root.attrib["width"], root.attrib["height"]]
    assert 0 < width <= WIDEST and height > 0
    for text in root.iter(f"{SVG}text"):
        right = float(text.get("x", 0)) + float(text.get("textLength", 0))
        assert right <= width and float(text.get("y", 0)) <= height, f"{text.text!r} leaves the picture"


@pytest.mark.parametrize("picture", DRAWN, ids=named)
def test_it_says_what_it_is_there_for(picture: Path) -> None:
    said = text_of(picture)
    assert picture.name in WORDS
    for words in WORDS[picture.name]:
        assert words in said


@pytest.mark.parametrize("picture", DRAWN, ids=named)
def test_what_the_demo_says_of_its_limit_is_what_happened(picture: Path) -> None:
    said = text_of(picture)
    promised = re.findall(r"(\d+) requests at once on \S+ USD, enough for (\d+)", said)
    assert promised or "A limit that holds" not in said
    for all_of_them, enough in promised:
        assert f"\n{enough} answered, {int(all_of_them) - int(enough)} refused with 402" in said
        assert (said.count("●"), said.count("×")) == (int(enough), int(all_of_them) - int(enough))


@pytest.mark.parametrize("picture", DRAWN, ids=named)
def test_a_browser_reads_it_to_its_end(picture: Path, tmp_path: Path) -> None:
    read = html.unescape(document(picture, tmp_path / "profile"))
    assert "<parsererror" not in read
    for text in ElementTree.parse(picture).iter(f"{SVG}text"):
        assert "".join(text.itertext()) in read


@pytest.mark.parametrize("picture", PICTURES, ids=named)
def test_a_browser_shows_it(picture: Path, tmp_path: Path) -> None:
    seen = look(picture, tmp_path)
    assert 300 < seen.width <= WIDEST and seen.height > 100, "a broken picture has no size, or that of a sign for it"
    commonest = next(iter(seen.colours.values()))
    assert commonest < 0.98, f"nearly all of it is one colour: {seen.colours}"
    assert len(seen.colours) > 16, "neither text nor lines of it are smooth"
    if picture.suffix == ".svg":
        ground, *inks = _colours_of(picture)
        assert seen.colours.get(ground, 0) > 0.5, "its ground is not the most of it"
        assert [ink for ink in inks if seen.colours.get(ink, 0) < 0.00005] == [], "a colour of its text is not seen"


def _colours_of(picture: Path) -> list[str]:
    """The ground of a picture of a terminal, and the colours of its text."""
    text = picture.read_text(encoding="utf-8")
    ground = re.search(r'<rect fill="(#[0-9a-f]{6})"', text)
    assert ground
    return [ground[1], *sorted(set(re.findall(r"\{ ?fill: (#[0-9a-f]{6})", text)))]


@pytest.mark.parametrize("page", sorted(ROOT.glob("README*.md")), ids=named)
def test_the_first_picture_of_a_readme_leaves_room_for_the_rest_of_the_screen(page: Path) -> None:
    first = ElementTree.parse(shown_by(page)[0]).getroot()
    assert float(first.attrib["height"]) <= IN_ONE_SCREEN * float(first.attrib["width"])
