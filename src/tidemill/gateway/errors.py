"""The errors of the data plane, one class for each code.

`gateway.protocols` writes them in the form of each API.
"""

from tidemill.errors import NotFound, TidemillError, Unavailable


class BadRequest(TidemillError):
    """The request is not valid."""

    status = 400
    code = "invalid_request_error"


class UnsupportedParameter(BadRequest):
    """A parameter that is not supported. It is refused by name, not ignored."""

    code = "unsupported_parameter"


class NoEmbeddings(BadRequest):
    """The model does not support embeddings."""

    code = "model_gives_no_embeddings"


class NoRanking(BadRequest):
    """The model does not support reranking."""

    code = "model_ranks_no_documents"


class InvalidKey(TidemillError):
    """No key, or one that does not exist or was revoked."""

    status = 401
    code = "invalid_api_key"


class ModelNotFound(TidemillError):
    """No model of that name."""

    status = 404
    code = "model_not_found"


class InsufficientQuota(TidemillError):
    """The tenant's balance does not cover what the request may cost."""

    status = 402
    code = "insufficient_quota"


class BodyTooLarge(TidemillError):
    """The body is larger than the limit."""

    status = 413
    code = "request_too_large"


class HttpRefusal(TidemillError):
    """The request matches no route, or is not valid HTTP."""

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ModerationNotConfigured(TidemillError):
    """No moderation model is configured. Not a 501, as clients retry those."""

    status = 404
    code = "moderation_not_configured"


class RateLimited(TidemillError):
    """A limit is reached; it frees by itself."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, hint: str, retry_after_s: int) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class BudgetExhausted(TidemillError):
    """A hard budget does not cover what the request may cost. Trying again helps only in the next period."""

    status = 429
    code = "insufficient_quota"

    def __init__(self, message: str, *, hint: str, retry_after_s: int) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class QueueFull(RateLimited):
    """The queue of a full model is full."""

    code = "queue_full"


class WaitedTooLong(Unavailable):
    """A request timed out in the queue of a full model."""

    code = "model_busy"


class TooManyWait(RateLimited):
    """Too many requests wait for a model that is starting."""

    code = "queue_full"


class StillAsleep(Unavailable):
    """The model was not ready within the time that a request waits for it."""

    code = "model_not_ready"


class NoReplica(Unavailable):
    """No replica of the model, nor of its fallbacks, can be used now."""

    code = "model_not_ready"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, hint="Try again in a few seconds.")
        self.retry_after_s = retry_after_s


class NotAllowed(TidemillError):
    """The key is valid, but does not allow this."""

    status = 403
    code = "not_allowed"


class EngineError(TidemillError):
    """The engine refused the request."""

    code = "engine_error"

    def __init__(self, message: str, *, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code or "engine_error"


class ResponseNotFound(NotFound):
    """The tenant has no such response, or it was not stored."""

    code = "response_not_found"


class NotForTenants(TidemillError):
    """The operator runs jobs for tenants, and does not let them do it themselves."""

    status = 403
    code = "not_allowed"


class TooManyUploads(TidemillError):
    """The tenant has the maximum number of uploads running."""

    status = 429
    code = "too_many_uploads"
