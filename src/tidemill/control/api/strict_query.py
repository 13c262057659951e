"""Query parameters are known and given once: a misspelt `month` must not quietly answer for all time."""

from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from tidemill.errors import BadInput
from tidemill.suggestions import nearest

_NOT_OF_THE_QUERY = {"platform", "data"}


def strict_query(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """A guard: raises BadInput at a query parameter that the handler does not have, or that comes twice."""
    known = handler.parsed_fn_signature.parameters.keys() - _NOT_OF_THE_QUERY
    seen: set[str] = set()
    for name, _ in connection.query_params.multi_items():
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean {near}?" if near else "See /api/openapi.json."
            raise BadInput(f"{name} is not a query parameter of {connection.url.path}.", hint=hint, param=name)
        if name in seen:
            raise BadInput(f"{name} is given twice.", param=name)
        seen.add(name)
