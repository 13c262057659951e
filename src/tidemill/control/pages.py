"""Lists in pages: how many rows one answer has."""

from tidemill.errors import BadInput

PAGE = 100
"""Rows in one answer, when nothing else was asked for."""
MAX_PAGE = 1_000


def check_limit(limit: int, most: int = MAX_PAGE) -> None:
    """Raises BadInput unless a page may have so many rows."""
    if not 1 <= limit <= most:
        raise BadInput(f"limit must be from 1 to {most}, not {limit}.", param="limit")
