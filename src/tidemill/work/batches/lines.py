"""The input file of a batch: its lines checked, and found again by their place.

Source: OpenAI's Batch guide, "Preparing your batch file". A file with an error in one line is not begun; what only an
engine can find wrong with a line (a parameter's value, a prompt that is too long) fails that line alone, later.
"""

import os
from array import array
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import msgspec

from tidemill.store.batches import LineError

MAX_ERRORS = 1000
"""Errors that a batch lists one by one; of what is beyond only the number is said."""
MAX_CUSTOM_ID = 512
BOM = b"\xef\xbb\xbf"
BEGINNING = 512
"""Bytes of a prompt that lines have in common when they are sent one after the other: some hundred tokens, which an
engine's cache then gives."""
_PROMPTS = (b'"messages"', b'"prompt"', b'"input"')
"""What comes before the prompt in a line's body."""


class InvalidBatchInput(Exception):
    """The file is not the input of a batch."""

    def __init__(self, errors: list[LineError]) -> None:
        super().__init__(f"{len(errors)} errors")
        self.errors = errors


class BatchLine(msgspec.Struct):
    """A request of a batch; its body is left undecoded."""

    custom_id: str | msgspec.UnsetType = msgspec.UNSET
    method: str | msgspec.UnsetType = msgspec.UNSET
    url: str | msgspec.UnsetType = msgspec.UNSET
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Body(msgspec.Struct):
    model: str | msgspec.UnsetType = msgspec.UNSET


class LineRules(msgspec.Struct, frozen=True):
    """What a file may be."""

    max_lines: int
    max_line_bytes: int


class LineIndex:
    """Where the lines of a file are. A line is known by its number in the file, from 1."""

    def __init__(self) -> None:
        self.numbers = array("I")
        self.offsets = array("Q")
        self.lengths = array("I")
        self.model_numbers = array("I")
        self.models: list[str] = []
        self.beginnings = array("I")
        """Equal for lines whose prompts begin alike; 0: with no other's."""

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def mean_length(self) -> int:
        """Bytes of a line, on average."""
        return sum(self.lengths) // max(len(self.lengths), 1)

    def rename(self, names: Mapping[str, str]) -> None:
        """Call the models by their own names, where they were asked for by an alias."""
        self.models = [names.get(model, model) for model in self.models]

    def model(self, place: int) -> str:
        """The model of the line at `place`, from 0."""
        return self.models[self.model_numbers[place]]

    def read(self, fd: int, place: int) -> bytes:
        """The line at `place`, from the open file. Blocking. Raises OSError when the file has shrunk."""
        length = self.lengths[place]
        data = os.pread(fd, length, self.offsets[place])
        if len(data) != length:
            raise OSError(f"line {self.numbers[place]} of the input file is cut off")
        return data


_decode_line = msgspec.json.Decoder(BatchLine).decode
_decode_body = msgspec.json.Decoder(_Body).decode


def decode_line(data: bytes) -> tuple[str, str, msgspec.Raw]:
    """Custom id, URL and body of a line that was checked before."""
    line = _decode_line(data)
    assert isinstance(line.custom_id, str) and isinstance(line.url, str) and isinstance(line.body, msgspec.Raw)
    return line.custom_id, line.url, line.body


def read_index(path: Path, endpoint: str, rules: LineRules, models: Collection[str] | None = None) -> LineIndex:
    """Check a file and find its lines. Blocking, about a second for 200 MB. Raises InvalidInput.

    `models`: the models there are; None when that does not matter any more, as the batch has begun.
    """
    with path.open("rb") as file:
        return _Reading(endpoint, rules, models).read(file)


def beginning_of(text: bytes) -> int:
    """A hash of how a line's prompt begins; 0 for one that is too short to have a beginning worth sharing."""
    for name in _PROMPTS:
        at = text.find(name)
        if at >= 0:
            return crc32(text[at : at + BEGINNING]) if len(text) - at >= 2 * BEGINNING else 0
    return 0


class _Reading:
    def __init__(self, endpoint: str, rules: LineRules, models: Collection[str] | None) -> None:
        self._endpoint = endpoint
        self._rules = rules
        self._known = models
        self._index = LineIndex()
        self._model_numbers: dict[str, int] = {}
        self._seen: set[str] = set()
        self._errors: list[LineError] = []
        self._wrong = 0

    def read(self, file: BinaryIO) -> LineIndex:
        offset = number = 0
        limit = self._rules.max_line_bytes
        while data := file.readline(limit + 2):
            number += 1
            start = len(BOM) if number == 1 and data.startswith(BOM) else 0
            if len(data) > limit + 1 or (len(data) > limit and not data.endswith(b"\n")):
                self._note(number, _Wrong("line_too_long", f"The line is longer than {limit // 2**20} MiB."))
                offset += len(data) + _skip_line(file, data)
                continue
            text = data[start:].rstrip(b"\r\n")
            if text.strip():
                self._take(number, text, offset + start)
            if len(self._index) > self._rules.max_lines:
                lines = self._rules.max_lines
                raise InvalidBatchInput([LineError("too_many_lines", f"The file has more than {lines} requests.")])
            offset += len(data)
        if not len(self._index) and not self._wrong:
            raise InvalidBatchInput([LineError("empty_file", "The file has no requests.")])
        if self._wrong > len(self._errors):
            more = self._wrong - len(self._errors)
            self._errors.append(LineError("too_many_errors", f"{more} more lines have errors."))
        if self._errors:
            raise InvalidBatchInput(self._errors)
        return self._index

    def _take(self, number: int, text: bytes, offset: int) -> None:
        try:
            model = self._check(text)
        except _Wrong as wrong:
            self._note(number, wrong)
            return
        index = self._index
        known = self._model_numbers.get(model)
        if known is None:
            known = self._model_numbers[model] = len(index.models)
            index.models.append(model)
        index.numbers.append(number)
        index.offsets.append(offset)
        index.lengths.append(len(text))
        index.model_numbers.append(known)
        index.beginnings.append(beginning_of(text))

    def _check(self, text: bytes) -> str:
        """The line's model. Raises _Wrong."""
        try:
            line = _decode_line(text)
            text.decode()
        except msgspec.ValidationError as error:
            raise _wrong_type(error, "") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _Wrong("invalid_json_line", "This line is not parseable as valid JSON.") from error
        for name in BatchLine.__struct_fields__:
            if getattr(line, name) is msgspec.UNSET:
                raise _Wrong("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
        custom_id, _, body = decode_line(text)
        if not 0 < len(custom_id) <= MAX_CUSTOM_ID:
            raise _Wrong("invalid_custom_id", f"The custom_id must have 1 to {MAX_CUSTOM_ID} characters.", "custom_id")
        if custom_id in self._seen:
            message = f"The custom_id {custom_id!r} is used by another line of this file."
            raise _Wrong("duplicate_custom_id", message, "custom_id")
        self._seen.add(custom_id)
        if line.method != "POST":
            raise _Wrong("invalid_method", "The method must be 'POST'.", "method")
        if line.url != self._endpoint:
            raise _Wrong("invalid_url", f"The url must be the endpoint of the batch, {self._endpoint!r}.", "url")
        return self._model_of(body)

    def _model_of(self, body: msgspec.Raw) -> str:
        try:
            model = _decode_body(body).model
        except msgspec.ValidationError as error:
            raise _wrong_type(error, "body") from error
        if not isinstance(model, str) or not model:
            raise _Wrong("missing_required_parameter", "Missing required parameter: 'body.model'.", "body.model")
        if self._known is not None and model not in self._known:
            message = f"The model {model[:128]!r} does not exist. GET /v1/models lists the models."
            raise _Wrong("model_not_found", message, "body.model")
        return model

    def _note(self, number: int, wrong: "_Wrong") -> None:
        self._wrong += 1
        if len(self._errors) < MAX_ERRORS:
            self._errors.append(LineError(wrong.code, wrong.message, wrong.param, number))


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


def _wrong_type(error: msgspec.ValidationError, within: str) -> _Wrong:
    message, _, path = str(error).partition(" - at `$")
    param = f"{within}{path.rstrip('`')}".strip(".") or None
    return _Wrong("invalid_type", f"{message}.", param)


def _skip_line(file: BinaryIO, data: bytes) -> int:
    """Pass over the rest of a line that is too long; gives its bytes."""
    skipped = 0
    while not data.endswith(b"\n") and (data := file.readline(1024 * 1024)):
        skipped += len(data)
    return skipped
