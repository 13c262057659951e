"""Which API a client speaks; it decides the format of errors."""

import msgspec

from tidemill.errors import TidemillError
from tidemill.gateway.protocols import openai_errors
from tidemill.gateway.protocols.anthropic import errors as anthropic_errors
from tidemill.http.server import Exchange

ANTHROPIC_PATHS = b"/v1/messages"


class Dialect(msgspec.Struct, frozen=True):
    """The error format of one API."""

    name: str

    def error_body(self, error: TidemillError, request_id: str) -> bytes:
        if self.name == "anthropic":
            return anthropic_errors.error_body(error, request_id)
        return openai_errors.error_body(error)


OPENAI = Dialect("openai")
ANTHROPIC = Dialect("anthropic")


def dialect_of(exchange: Exchange) -> Dialect:
    """The API of a request, by its path or the version header that Anthropic's clients always send."""
    if exchange.path.startswith(ANTHROPIC_PATHS) or b"anthropic-version" in exchange.headers:
        return ANTHROPIC
    return OPENAI
