"""The stage of `tidemill demo` and its pictures: XML that any reader takes, whatever is shown."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from tidemill.cli.demo_picture import _template, picture_of
from tidemill.cli.demo_stage import DemoStage

AWKWARD = [
    "a -- b --> <!-- c",
    "<b>&amp; & ]]> \"quoted\" 'too'</text></svg>",
    "{braces} {0} %s",
    'clip-path="url(#x-line-1)" textLength="3"',
    "\x00\x01\x07\x1b[31mred\x1b[0m\x7f\x85",
    "\ud800 half a pair, \ufffe and \uffff",
    "海州云 \u2028 \u202e 👩‍🔬 \xa0",
    "[bold]no markup[/]",
]
TEXTS = st.text(st.characters(), max_size=120) | st.sampled_from(AWKWARD)


def played(stage: DemoStage, text: str) -> DemoStage:
    """A short play in which everything is called `text`."""
    stage.title("Tidemill", text)
    for _ in range(3):
        stage.act(text, text)
        stage.say(text)
        stage.page(text)
        stage.table([("tenant", ""), ("balance", "right")], [(text, text)])
        stage.show(stage.dots([0, 200, 402]))
    stage.verdict({text: True, "never": False}, 1.0)
    return stage


@given(text=TEXTS, title=TEXTS)
@examples(0.6)
def test_a_picture_is_well_formed_whatever_it_shows(text: str, title: str, tmp_path: Path) -> None:
    stage = played(DemoStage(quiet=True), text)
    whole, part = tmp_path / "whole.svg", tmp_path / "part.svg"
    stage.save(whole, title=title)
    stage.save_acts(part, [1, 3], title=title)
    for picture in (whole, part):
        assert ElementTree.fromstring(picture.read_text(encoding="utf-8")).tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("text", AWKWARD)
def test_what_is_awkward_is_still_well_formed(text: str) -> None:
    assert len(ElementTree.fromstring(picture_of([text], title=text))) > 0


def test_text_is_shown_as_it_is() -> None:
    root = ElementTree.fromstring(picture_of(['<b>&amp; "x" -- {0}'], title="a --> b & <c>"))
    said = " ".join(root.itertext()).replace("\xa0", " ")
    assert '<b>&amp; "x" -- {0}' in said
    assert "a --> b & <c>" in said


def test_the_template_has_a_size_and_no_comment() -> None:
    assert "<!--" not in _template() and "@font-face" not in _template()
    assert 'width="{width}" height="{height}" viewBox="0 0 {width} {height}"' in _template()


def test_acts_alone_have_no_number_and_nothing_around_them(tmp_path: Path) -> None:
    stage = DemoStage(quiet=True)
    stage.say("before all")
    for name in ("one", "two", "three"):
        stage.act(f"act {name}", "how")
        stage.say(f"said in {name}")
    stage.verdict({"it held": True}, 1.0)

    def lines(name: str) -> str:
        return " ".join(ElementTree.parse(tmp_path / name).getroot().itertext()).replace("\xa0", " ")

    stage.save(tmp_path / "all.svg", title="t")
    for words in ("before all", "1 act one", "2 act two", "said in three", "it held"):
        assert words in lines("all.svg")
    stage.save_acts(tmp_path / "few.svg", [1, 3], title="t")
    assert "act one" in lines("few.svg") and "said in three" in lines("few.svg")
    for words in ("before all", "1 act", "act two", "it held"):
        assert words not in lines("few.svg")
