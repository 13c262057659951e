"""The nearest known name, for the hints of errors."""

from tidemill.suggestions import did_you_mean, nearest


def test_the_nearest_name_is_found() -> None:
    known = {"input": 1, "output": 2}
    assert nearest("outptu", known) == "output"
    assert did_you_mean("imput", known) == "Did you mean 'input'?"


def test_a_name_that_is_like_none_has_no_hint() -> None:
    assert nearest("zzz", ["input", "output"]) is None
    assert did_you_mean("zzz", []) == ""


def test_the_cutoff_says_how_like_it_must_be() -> None:
    assert nearest("h900", ["h800-sxm"]) is None
    assert nearest("h900", ["h800-sxm"], cutoff=0.5) == "h800-sxm"
