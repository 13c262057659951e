"""One attempt at a line: what was asked, what came back, and what follows from it."""

from typing import Protocol

import msgspec

from tidemill.store.batches import LineCounts
from tidemill.work.batches.results import LineFailure, LineResponse, usage_counts

MAX_LOST = 3
"""Attempts at a line whose engine or gateway is lost, or fails, each time. Then it fails: it is what kills them."""
SUSPECT_AFTER = 2
"""A line that was lost so often is tried alone, so that it takes no others with it, nor they it."""
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
"""However late an answer asks to come again: a limit may be raised before."""

BROKE = 402
"""The balance does not cover the line."""
_FAILURES = (408, 500, 502, 504)
_REFUSALS = (429, 503, 529)
_encode = msgspec.json.Encoder().encode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class LineCall(msgspec.Struct, frozen=True, kw_only=True):
    """A line on its way to the platform's own data plane."""

    path: str
    """The endpoint, `/v1/chat/completions`."""
    body: bytes
    tenant_id: str
    key_id: str
    request_id: str


class LineAnswer(msgspec.Struct, frozen=True):
    """What the data plane has answered."""

    status: int
    body: bytes
    retry_after_s: float = 0.0


class NoAnswer(Exception):
    """No answer came. `sent`: the request may have reached the data plane; False: surely not."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class SendLine(Protocol):
    """Sends a line into the data plane, as any other request.

    With its admission, metering and billing.
    """

    async def __call__(self, call: LineCall) -> LineAnswer:
        """Raises Lost."""
        ...


class LineTries(msgspec.Struct):
    """How often a line was tried in vain, in this process."""

    lost: int = 0


class RetryLater(msgspec.Struct, frozen=True):
    """Try the line once more, not before `after_s` seconds. `pause`: so shall the tenant's other lines."""

    after_s: float
    pause: bool = False


class LineDone(msgspec.Struct, frozen=True):
    """The line's result."""

    response: LineResponse | None
    failure: LineFailure | None = None
    usage: LineCounts = LineCounts()


def judge(answer: LineAnswer, request_id: str, tries: LineTries, *, alone: bool) -> RetryLater | LineDone:
    """What follows from an answer. `alone`: nothing else of the tenant's batches is in flight."""
    if answer.status in _REFUSALS:
        return RetryLater(min(max(answer.retry_after_s, FIRST_WAIT_S), LONGEST_WAIT_S), pause=True)
    if answer.status in _FAILURES and (again := _once_more(tries)):
        return again
    if answer.status == BROKE and not alone:
        return RetryLater(0.0)  # the others hold money that they will not need
    body = one_line(answer.body)
    if body is None and answer.status == 200:
        return LineDone(None, LineFailure("invalid_answer", "The model's engine sent an answer that is not JSON."))
    if body is None:
        text = answer.body[:1000].decode(errors="replace")
        body = _encode({"error": {"message": text, "type": "server_error", "param": None, "code": None}})
    response = LineResponse(answer.status, request_id, msgspec.Raw(body))
    return LineDone(response, usage=usage_counts(body) if answer.status == 200 else LineCounts())


def judge_lost(lost: NoAnswer, tries: LineTries) -> RetryLater | LineDone:
    """What follows when no answer came."""
    if not lost.sent:
        return RetryLater(FIRST_WAIT_S, pause=True)
    return _once_more(tries) or LineDone(
        None, LineFailure("request_lost", f"The request was lost {MAX_LOST} times: {lost}")
    )


def refused(message: str, request_id: str, param: str) -> LineDone:
    """The result of a line that is not even asked for."""
    error = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": "unsupported"}}
    return LineDone(LineResponse(400, request_id, msgspec.Raw(_encode(error))))


def one_line(body: bytes) -> bytes | None:
    """A JSON object without line breaks, as JSONL needs it; None for what is no JSON object."""
    try:
        _decode_object(body)
        body.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return msgspec.json.format(body, indent=-1) if b"\n" in body or b"\r" in body else body


def _once_more(tries: LineTries) -> RetryLater | None:
    tries.lost += 1
    if tries.lost >= MAX_LOST:
        return None
    return RetryLater(min(FIRST_WAIT_S * 2**tries.lost, LONGEST_WAIT_S))
