"""Who may use the admin API: whoever holds the installation's admin token."""

import hmac
from typing import Any

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.types import Guard

from tidemill.errors import TidemillError
from tidemill.store.keys import digest_of

WHERE = (
    "It is in the file admin-token of the data directory, unless TIDEMILL_ADMIN_TOKEN set it when the platform was"
    " started. Send it as `Authorization: Bearer TOKEN`."
)


class Unauthorized(TidemillError):
    """No admin token, or a wrong one."""

    status = 401
    code = "unauthorized"


def bearer_guard(admin_token_digest: str) -> Guard:
    """A guard that lets pass who sends the token with this digest (`store.keys.digest_of`).

    It raises Unauthorized for anyone else.
    """

    def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        scheme, _, token = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthorized("The admin API needs the admin token.", hint=WHERE)
        # Digests are compared, so that neither the time it takes nor its length tells anything of the token.
        if not hmac.compare_digest(digest_of(token.strip()), admin_token_digest):
            raise Unauthorized("This is not the admin token of this installation.", hint=WHERE)

    return guard
