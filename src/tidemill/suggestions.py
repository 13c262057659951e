"""The known name that a misspelt one was probably meant to be, for the hints of errors."""

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name that is most like `name`; None when none is close.

    `cutoff`: 0 takes any, 1 only equal ones.
    """
    import difflib  # slow to import, and only errors need it

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "Did you mean ...?" for the nearest known name; empty when none is close."""
    near = nearest(name, known)
    return f"Did you mean {near!r}?" if near else ""
