"""Cursor pagination in OpenAI's format: `after` and `limit`."""

from collections.abc import Sequence
from urllib.parse import parse_qsl

from tidemill.gateway.errors import BadRequest
from tidemill.http.server import Exchange


def query_of(exchange: Exchange) -> dict[str, str]:
    """The query parameters; of one given twice the last counts. Raises BadRequest."""
    try:
        return dict(parse_qsl(exchange.query.decode("latin-1"), max_num_fields=64))
    except ValueError as error:
        raise BadRequest("The query string has too many parameters.") from error


def limit_of(query: dict[str, str], *, default: int, highest: int) -> int:
    """The number of entries per page. Raises BadRequest."""
    text = query.get("limit", "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= 9) or not 1 <= int(text) <= highest:
        raise BadRequest(f"'limit' is {text[:20]!r}, but must be from 1 to {highest}.", param="limit")
    return int(text)


def page(entries: Sequence[dict[str, object]], limit: int) -> dict[str, object]:
    """A page of a list, from one entry more than it has if there is another page."""
    shown = entries[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(entries) > limit,
    }
