"""Talking to the data plane with a tenant's key, as any of its programs does: files and batches."""

import http.client
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from tidemill.cli.client import RequestRefused, connection_to, reason_of
from tidemill.errors import BadInput, Unavailable

CHUNK = 1 << 20

Json = dict[str, Any]


class TenantClient:
    """One tenant's side of the platform at `url`, which ends in `/v1`. Raises Unavailable, Refused."""

    def __init__(self, url: str, key: str) -> None:
        if not key.isascii() or not key.isprintable() or not key:
            raise BadInput("The API key is not valid: it must have only letters, digits and hyphens.")
        self.url = url.rstrip("/")
        self._path = urlsplit(self.url).path
        self._key = key

    def upload(self, path: Path) -> Json:
        """Upload the input of a batch. Raises BadInput for a file that cannot be read."""
        boundary = secrets.token_hex(16)
        name = "".join(letter for letter in path.name if letter.isprintable() and letter not in '"\\')
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                headers = {
                    "Content-Type": f"multipart/form-data; boundary={boundary}",
                    "Content-Length": str(len(head) + size + len(tail)),
                }
                return _object(self._ask("POST", "/files", _form(head, file, tail), headers), self.url)
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from error

    def create_batch(self, file_id: str, endpoint: str) -> Json:
        fields = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h"}
        body = json.dumps(fields).encode()
        return _object(self._ask("POST", "/batches", body, {"Content-Type": "application/json"}), self.url)

    def batch(self, batch_id: str) -> Json:
        return _object(self._ask("GET", f"/batches/{quote(batch_id, safe='')}"), self.url)

    def content(self, file_id: str) -> Iterator[bytes]:
        """A file's bytes, piece by piece."""
        connection, answer = self._open("GET", f"/files/{quote(file_id, safe='')}/content", None, {})
        try:
            while data := answer.read(CHUNK):
                yield data
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            connection.close()

    def _ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> bytes:
        connection, answer = self._open(method, path, body, headers or {})
        try:
            return answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            connection.close()

    def _open(
        self, method: str, path: str, body: Any, headers: dict[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = connection_to(self.url, "a data plane")
        headers = {"Authorization": f"Bearer {self._key}", **headers}
        try:
            try:
                connection.connect()
                connection.request(method, self._path + path, body, headers)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it may have answered before it had all of the body, and says why
            answer = connection.getresponse()
            if answer.status < 300:
                return connection, answer
            refusal = _refusal(answer.status, answer.read(), self.url)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._broken(error) from error
        connection.close()
        raise refusal

    def _broken(self, error: Exception) -> Unavailable:
        return Unavailable(f"The platform at {self.url} does not answer ({reason_of(error)}).", hint="Is it running?")


def _form(head: bytes, file: BinaryIO, tail: bytes) -> Iterator[bytes]:
    yield head
    while data := file.read(CHUNK):
        yield data
    yield tail


def _object(raw: bytes, url: str) -> Json:
    try:
        document = json.loads(raw)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise Unavailable(f"{url} answers, but is not Tidemill's data plane.", hint="Does the address end in /v1?")
    return document


def _refusal(status: int, raw: bytes, url: str) -> Unavailable | RequestRefused:
    try:
        return RequestRefused(str(json.loads(raw)["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        hint = "Does the address end in /v1?"
        return Unavailable(f"{url} answers {status}, but is not Tidemill's data plane.", hint=hint)
