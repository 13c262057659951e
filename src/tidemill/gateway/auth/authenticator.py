"""API keys to principals: one dictionary look-up in a snapshot of the store."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import structlog

from tidemill.errors import Unavailable
from tidemill.gateway.auth.internal_token import SCHEME, InternalAuth
from tidemill.gateway.auth.key_policy import Network
from tidemill.gateway.auth.snapshot import EMPTY, AccessSnapshot, PricePoint, Principal, key_digest, read_snapshot
from tidemill.gateway.errors import BadRequest, InvalidKey
from tidemill.http.server import Exchange
from tidemill.ledger.pricing import PriceTier
from tidemill.meter.balance_leases import STORE_PATIENCE_S
from tidemill.store.engine import Store

log = structlog.get_logger()

ASK_EVERY_S = 0.2
"""An unknown key makes the process ask the store for news at most this often."""


class Authenticator:
    """Authenticates keys against a snapshot of the store that is refreshed in the background.

    While the store does not answer, the last snapshot stays in force: valid keys go on being valid.
    """

    def __init__(
        self,
        store: Store,
        executor: Executor,
        road: InternalAuth | None = None,
        *,
        proxies: Sequence[Network] = (),
    ) -> None:
        """`proxies`: networks of reverse proxies, whose word is taken for where a request comes from."""
        self._store = store
        self._road = road or InternalAuth()
        self._proxies = proxies
        self._executor = executor
        self._asked_at = float("-inf")
        self._renewing: asyncio.Task[None] | None = None
        self.snapshot: AccessSnapshot = EMPTY
        self.answering = False
        """The store has answered when it was last asked."""
        self.on_news: Callable[[AccessSnapshot], None] | None = None
        """Called with each new snapshot."""

    def admit(self, exchange: Exchange) -> Principal | None:
        """The principal of a request's key; None for a key that is not in the snapshot.

        Raises InvalidKey when there is none at all or it has expired, NotAllowed when it may not be used from there.
        """
        header = exchange.headers.get(b"authorization", b"")
        scheme, _, secret = header.partition(b" ")
        scheme = scheme.lower()
        if scheme == SCHEME:
            return self._road.admit(exchange, secret, self.snapshot)
        if scheme != b"bearer" or not secret:
            secret = exchange.headers.get(b"x-api-key", b"")  # where Anthropic's clients put it
        if not secret:
            raise InvalidKey("No API key was provided.", hint="Send the header 'Authorization: Bearer sk-...'.")
        principal = self.snapshot.keys.get(key_digest(secret.strip()))
        if principal is not None and principal.rules is not None:
            principal.rules.check(exchange, self._proxies)
        return principal

    async def authenticate(self, exchange: Exchange) -> Principal:
        """The principal of a request's key; refreshes the snapshot for an unknown key.

        Raises InvalidKey, NotAllowed, or Unavailable when the store does not answer.
        """
        return self.admit(exchange) or await self._refresh_and_admit(exchange)

    async def _refresh_and_admit(self, exchange: Exchange) -> Principal:
        """Refresh the snapshot and look the key up again.

        It may have been made a moment ago, and may be a good one even if the store does not answer.
        """
        may_ask = time.monotonic() - self._asked_at > ASK_EVERY_S
        if self._renewing is not None:  # it may have looked a moment before now
            await asyncio.wait([self._renewing], timeout=STORE_PATIENCE_S)
        if self._renewing is None and may_ask:
            await asyncio.wait([self._start_renewal()], timeout=STORE_PATIENCE_S)
        principal = self.admit(exchange)
        if principal is None:
            if self._renewing is not None or not self.answering:
                raise Unavailable(
                    "Your API key cannot be checked now: this gateway does not know it yet,"
                    " and the database does not answer.",
                    hint="Try again in a moment.",
                )
            raise InvalidKey("This API key does not exist or was revoked.", hint="Ask your operator for a key.")
        return principal

    def price(self, model: str, principal: Principal) -> PricePoint:
        """The price of a model in force for a tenant.

        Raises BadRequest when the model is not sold in its currency, NotAllowed when it is not for this key.
        """
        if principal.rules is not None:
            principal.rules.check_model(model)
        snapshot = self.snapshot
        prices = snapshot.prices if principal.tier is PriceTier.STANDARD else snapshot.batch_prices
        point = prices.get((model, principal.currency))
        if point is None:
            raise BadRequest(
                f"The model {model!r} has no price in {principal.currency}, the currency of your account.",
                hint="Ask your operator to set one.",
                param="model",
            )
        return point

    async def renew(self) -> None:
        """Refresh the snapshot from the store, if the store has changed; one read at a time."""
        if self._renewing is not None:
            await asyncio.shield(self._renewing)  # it may have looked a moment before now
        await asyncio.shield(self._renewing or self._start_renewal())

    def _start_renewal(self) -> "asyncio.Task[None]":
        self._renewing = asyncio.create_task(self._renew())
        return self._renewing

    async def _renew(self) -> None:
        self._asked_at = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            fresh = await loop.run_in_executor(self._executor, read_snapshot, self._store, self.snapshot.revision)
            if fresh is not None:
                self.snapshot = fresh
                if self.on_news is not None:
                    self.on_news(fresh)
            self.answering = True
        except Unavailable as error:
            self.answering = False
            log.warning("the store does not answer; keys and prices stay as they were", reason=str(error))
        finally:
            self._renewing = None
