"""The platform's internal token, which authenticates lines of batches.

They come as any other request does, in their tenant's name.

    Authorization: Tidemill TOKEN
    x-tidemill-tenant: ten_...      whose request it is
    x-tidemill-key: key_...         the key that it is metered under: the one that made the batch
    x-tidemill-request: batch_..._7 the id of the request, the same at each attempt

The token is made at each start of the platform, and handed to its processes over their standard input; it is stored
nowhere. It is taken only from this machine. A request that comes by it is of the tier `batch`.
"""

import hashlib
import hmac
import re

import msgspec

from tidemill.gateway.auth.snapshot import EMPTY, AccessSnapshot, Principal
from tidemill.gateway.errors import BadRequest, InvalidKey
from tidemill.http.server import Exchange
from tidemill.ledger.pricing import PriceTier

SCHEME = b"tidemill"
_REQUEST_ID = re.compile(r"batch_[a-z0-9]{1,24}_[0-9]{1,9}")


class InvalidInternalToken(InvalidKey):
    """The token is not the one of this run of the platform."""

    code = "invalid_internal_key"


class InternalAuth:
    """Authenticates the platform's own processes. Without a token it rejects all."""

    def __init__(self, token: str = "") -> None:
        self._digest = hashlib.sha256(token.encode()).digest() if token else b""
        self._snapshot: AccessSnapshot = EMPTY
        self._by_key: dict[str, Principal] = {}
        self._by_tenant: dict[str, Principal] = {}

    def admit(self, exchange: Exchange, secret: bytes, snapshot: AccessSnapshot) -> Principal | None:
        """The principal that the request names; None if its tenant has no key in the snapshot.

        Gives the exchange the request's id. Raises NotOurs.
        """
        given = hashlib.sha256(secret.strip()).digest()
        if not self._digest or not hmac.compare_digest(given, self._digest) or not exchange.from_here:
            raise InvalidInternalToken("This authorization is not valid.", hint="Send 'Authorization: Bearer sk-...'.")
        named = _header(exchange, b"x-tidemill-request")
        if not _REQUEST_ID.fullmatch(named):
            raise BadRequest("x-tidemill-request must be the id of a batch line.")
        tenant_id, key_id = _header(exchange, b"x-tidemill-tenant"), _header(exchange, b"x-tidemill-key")
        self._look_up(snapshot)
        principal = self._by_key.get(key_id)
        if principal is None or principal.tenant_id != tenant_id:
            principal = self._by_tenant.get(tenant_id)  # the key was revoked since; the tenant is still a customer
        if principal is None:
            return None
        exchange.request_id = named
        return msgspec.structs.replace(principal, key_id=key_id, tier=PriceTier.BATCH)

    def _look_up(self, snapshot: AccessSnapshot) -> None:
        if snapshot is not self._snapshot:
            self._snapshot = snapshot
            self._by_key = {principal.key_id: principal for principal in snapshot.keys.values()}
            self._by_tenant = {principal.tenant_id: principal for principal in snapshot.keys.values()}


def _header(exchange: Exchange, name: bytes) -> str:
    return exchange.headers.get(name, b"").decode("latin-1")
