"""What is known of a request from its key and its body on.

One struct that admission, routing and proxy share.
"""

from tidemill.gateway.auth.snapshot import PricePoint, Principal
from tidemill.gateway.protocols.request import ModelRequest
from tidemill.gateway.routing.models import ModelRoute
from tidemill.http.exchange import Exchange


class RequestContext:
    """A request that was read: who asks which model for what, at which price, and where the answer goes."""

    __slots__ = ("exchange", "price", "principal", "request", "route")

    def __init__(
        self, exchange: Exchange, request: ModelRequest, principal: Principal, route: ModelRoute, price: PricePoint
    ) -> None:
        self.exchange = exchange
        self.request = request
        self.principal = principal
        self.route = route
        """The model that was asked for."""
        self.price = price
        """Of that model, whichever model answers."""
