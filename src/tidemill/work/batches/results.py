"""The results of a batch's lines, as they come: two files that become the output and the error file.

A line's result is one append of one JSON line, whose `id` names the line. So what is recorded can be told from the
files alone: after a kill the next runner reads them, cuts off a torn end, and goes on with the lines that are missing.
"""

import os
from pathlib import Path

import msgspec

from tidemill.store.batches import LineCounts

OUTPUT = "output.jsonl"
ERRORS = "errors.jsonl"

_encode = msgspec.json.Encoder().encode


class LineResponse(msgspec.Struct, frozen=True):
    """The answer to a line, as OpenAI's output files have it."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineFailure(msgspec.Struct, frozen=True):
    """Why a line has no answer."""

    code: str
    message: str


class ResultLine(msgspec.Struct, frozen=True):
    """A line of an output or error file."""

    id: str
    custom_id: str
    response: LineResponse | None
    error: LineFailure | None


class _Known(msgspec.Struct):
    id: str
    response: msgspec.Raw = msgspec.Raw(b"null")


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    """Both dialects: chat completions', and that of responses."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _OutputDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _PromptDetails | None = None
    output_tokens_details: _OutputDetails | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class _Answered(msgspec.Struct):
    body: _Body


_decode_known = msgspec.json.Decoder(_Known).decode
_decode_answered = msgspec.json.Decoder(_Answered).decode
_decode_body = msgspec.json.Decoder(_Body).decode


def entry_id(batch_id: str, number: int) -> str:
    """The `id` of a line's result."""
    return f"batch_req_{batch_id.removeprefix('batch_')}_{number}"


def request_id(batch_id: str, number: int) -> str:
    """The request id that every attempt at a line has: a line is billed once, as a request id is."""
    return f"{batch_id}_{number}"


class Results:
    """The results of one batch, in a directory of its own. All methods block on the disk.

    Raises OSError when the disk refuses; what was being recorded is then not in the files.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        self.done: set[int] = set()
        """The numbers of the lines whose result is recorded."""
        self.counts = LineCounts()
        self._fds: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._dirty = False
        for name in (OUTPUT, ERRORS):
            self._fds[name] = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._sizes[name] = self._recover(name)

    def record(self, number: int, entry: ResultLine, usage: LineCounts) -> None:
        """Append a line's result."""
        name = (
            OUTPUT
            if entry.error is None and entry.response is not None and entry.response.status_code == 200
            else ERRORS
        )
        self._append(name, _encode(entry) + b"\n")
        self.done.add(number)
        self.counts += usage + (LineCounts(completed=1) if name == OUTPUT else LineCounts(failed=1))

    def sync(self) -> None:
        """All that was recorded is on disk afterwards."""
        dirty, self._dirty = self._dirty, False  # what is recorded from now on may not be covered
        if dirty:
            for fd in self._fds.values():
                os.fdatasync(fd)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    def _append(self, name: str, data: bytes) -> None:
        fd, size = self._fds[name], self._sizes[name]
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except OSError:
            os.ftruncate(fd, size)
            raise
        self._sizes[name] = size + len(data)
        self._dirty = True

    def _recover(self, name: str) -> int:
        """Read what is recorded; gives the size of what is whole, and cuts off what is not."""
        size = 0
        with open(self._fds[name], "rb", closefd=False) as file:
            file.seek(0)
            for line in file:
                try:
                    known = _decode_known(line)
                    number = int(known.id.rpartition("_")[2])
                except (msgspec.DecodeError, UnicodeDecodeError, ValueError):
                    break
                if not line.endswith(b"\n"):
                    break
                size += len(line)
                self.done.add(number)
                self.counts += (
                    LineCounts(completed=1) + _usage_in(known.response) if name == OUTPUT else LineCounts(failed=1)
                )
        os.ftruncate(self._fds[name], size)
        return size


def usage_counts(body: bytes) -> LineCounts:
    """The tokens that an answer reports; none when it does not."""
    try:
        usage = _decode_body(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError):
        return LineCounts()
    return _counts(usage)


def _usage_in(response: msgspec.Raw) -> LineCounts:
    try:
        return _counts(_decode_answered(response).body.usage)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return LineCounts()


def _counts(usage: _Usage | None) -> LineCounts:
    if usage is None:
        return LineCounts()
    prompt = usage.prompt_tokens_details or usage.input_tokens_details or _PromptDetails()
    output = usage.completion_tokens_details or usage.output_tokens_details or _OutputDetails()
    return LineCounts(
        input_tokens=usage.prompt_tokens or usage.input_tokens or 0,
        cached_tokens=prompt.cached_tokens or 0,
        output_tokens=usage.completion_tokens or usage.output_tokens or 0,
        reasoning_tokens=output.reasoning_tokens or 0,
    )
