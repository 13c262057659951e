"""The family of errors that reach a reader.

A tenant's developer, an operator at the shell, a page of the console.

Each has an HTTP status, a machine-readable code and a message that says what is wrong, where, and what to do. They
are rendered in one place per protocol (`gateway.errors`, `control.api.errors`, `cli.output`).
"""


class TidemillError(Exception):
    """Something a person can act upon. `hint` says what to do; it is part of the text that readers see."""

    status = 500
    code = "internal_error"
    retry_after_s: int | None = None
    """When to try again, where that is known."""

    def __init__(self, message: str, *, hint: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class BadInput(TidemillError):
    """The input is not valid."""

    status = 400
    code = "invalid_request"


class ConfigError(BadInput):
    """The configuration file is not valid. The message names the file and the key or line."""

    code = "invalid_config"


class NotFound(TidemillError):
    """The thing named does not exist."""

    status = 404
    code = "not_found"


class Conflict(TidemillError):
    """The thing exists already, or is in a state that does not allow this."""

    status = 409
    code = "conflict"


class Unavailable(TidemillError):
    """Not now: something that this needs does not answer or is starting. Trying again later may help."""

    status = 503
    code = "unavailable"
