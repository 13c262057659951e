"""Talking to a running platform over its admin API."""

import http.client
import json
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode, urlsplit

from tidemill.errors import BadInput, TidemillError, Unavailable

TIMEOUT_S = 120.0
"""How long the platform may be silent; a big invoice takes a while."""
PAGE = 10_000
"""Usage records asked for at a time: the most that the API gives."""
TRIES = 3
"""How often usage of many pages is read until its parts agree."""
API = "/api/v1"

Json = dict[str, Any]


class RequestRefused(TidemillError):
    """The platform's own error, as it worded it."""


class AdminClient:
    """A running platform.

    Each method is one of the API's routes. Raises Unavailable when it does not answer.
    """

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        connection_to(url)
        if not token.isascii() or not token.isprintable() or not token:
            raise BadInput("The admin token is not valid: it must have only letters and digits.")
        self.url = url.rstrip("/")
        self._parts = parts
        self._token = token

    def tenants(self) -> Json:
        return self._json("GET", "/tenants")

    def keys(self, tenant: str | None) -> Json:
        return self._json("GET", "/keys", {"tenant": tenant})

    def usage(self, tenant: str, month: str | None, *, records: bool) -> Json:
        """The statement; with `records` all of them, page by page, as many as the statement counts."""
        asked = {"tenant": tenant, "month": month}
        if not records:
            return self._json("GET", "/usage", asked)
        for _ in range(TRIES):
            pages = self._usage_pages(asked)
            found: Json = {**pages[-1], "records": [record for page in pages for record in page["records"]]}
            if found["requests"] == len(found["records"]):
                return found
            # A request that finished before the end of an earlier page was stored only after it had been read.
        raise Unavailable("The usage changed while it was being read.", hint="Ask for one month, or try again.")

    def _usage_pages(self, asked: dict[str, str | None]) -> list[Json]:
        pages: list[Json] = []
        after: str | None = None
        while not pages or after:
            pages.append(self._json("GET", "/usage", {**asked, "records": "true", "limit": str(PAGE), "after": after}))
            after = pages[-1].pop("next", None)
        return pages

    def invoice(self, tenant: str, month: str | None) -> Json:
        return self._json("GET", "/invoices", {"tenant": tenant, "month": month})

    def invoice_text(self, tenant: str, month: str | None) -> str:
        return self._ask("GET", "/invoices/text", {"tenant": tenant, "month": month}).decode()

    def margin(self, month: str | None) -> Json:
        return self._json("GET", "/margin", {"month": month})

    def models(self) -> Json:
        return self._json("GET", "/models")

    def roll(self, model: str, path: str, version: str) -> Json:
        return self._json("POST", "/models/roll", body={"model": model, "path": path, "version": version})

    def rolls(self) -> Json:
        return self._json("GET", "/models/roll")

    def reconcile(self) -> Json:
        return self._json("GET", "/meter/reconcile")

    def check_ledger(self) -> Json:
        return self._json("GET", "/ledger/check")

    def reconcile_text(self) -> str:
        return self._ask("GET", "/meter/reconcile/text").decode()

    def create_tenant(self, name: str, currency: str | None) -> Json:
        return self._json("POST", "/tenants", body={"name": name, "currency": currency})

    def set_weight(self, tenant: str, weight: int) -> Json:
        return self._json("POST", "/tenants/weight", body={"tenant": tenant, "weight": weight})

    def create_key(self, tenant: str, name: str, **policy: Any) -> Json:
        """`policy`: what of `expires`, `models` and `ips` is to be bound."""
        return self._json("POST", "/keys", body={"tenant": tenant, "name": name, **policy})

    def rotate_key(self, key: str, overlap: str) -> Json:
        return self._json("POST", "/keys/rotate", body={"key": key, "overlap": overlap})

    def revoke_key(self, key: str) -> Json:
        return self._json("POST", "/keys/revoke", body={"key": key})

    def limits(self, tenant: str | None) -> Json:
        return self._json("GET", "/limits", {"tenant": tenant})

    def set_limits(self, **fields: Any) -> Json:
        return self._json("POST", "/limits", body=fields)

    def remove_limit(self, limit: str) -> Json:
        return self._json("POST", "/limits/remove", body={"limit": limit})

    def batches(self, tenant: str | None, *, unfinished: bool, limit: int) -> Json:
        asked = {"tenant": tenant, "unfinished": "true" if unfinished else None, "limit": str(limit)}
        return self._json("GET", "/batches", asked)

    def batch(self, batch: str) -> Json:
        return self._json("GET", f"/batches/{quote(batch, safe='')}")

    def cancel_batch(self, batch: str) -> Json:
        return self._json("POST", "/batches/cancel", body={"batch": batch})

    def jobs(self, tenant: str | None, *, state: str | None, unfinished: bool, limit: int) -> Json:
        asked = {"tenant": tenant, "status": state, "unfinished": "true" if unfinished else None, "limit": str(limit)}
        return self._json("GET", "/jobs", asked)

    def job(self, job: str) -> Json:
        return self._json("GET", "/jobs/show", {"job": job})

    def submit_job(self, **fields: Any) -> Json:
        return self._json("POST", "/jobs", body=fields)

    def cancel_job(self, job: str) -> Json:
        return self._json("POST", "/jobs/cancel", body={"job": job})

    def job_logs(self, job: str, attempt: int | None, rank: int, cursor: str) -> Json:
        number = None if attempt is None else str(attempt)
        asked = {"job": job, "attempt": number, "rank": str(rank), "cursor": cursor or None}
        return self._json("GET", "/jobs/logs", asked)

    def job_artifacts(self, job: str) -> Json:
        return self._json("GET", "/jobs/artifacts", {"job": job})

    def download_artifact(self, job: str, path: str, target: Path) -> int:
        """Write an artefact into the file `target`, whole or not at all; gives its bytes."""
        part = target.with_name(target.name + ".part")
        try:
            with part.open("wb") as file:
                self._ask("GET", "/jobs/artifact", {"job": job, "path": path}, into=file)
                size = file.tell()
            part.rename(target)
        except OSError as error:
            raise BadInput(f"{target} cannot be written: {error.strerror}.") from error
        finally:
            part.unlink(missing_ok=True)
        return size

    def fleet(self) -> Json:
        return self._json("GET", "/fleet")

    def fleet_why(self) -> Json:
        return self._json("GET", "/fleet/why")

    def drain(self, name: str, why: str) -> Json:
        return self._json("POST", "/fleet/drain", body={"name": name, "why": why})

    def undrain(self, name: str) -> Json:
        return self._json("POST", "/fleet/undrain", body={"name": name})

    def queues(self) -> Json:
        return self._json("GET", "/queues")

    def set_queue(self, **fields: Any) -> Json:
        return self._json("POST", "/queues", body=fields)

    def remove_queue(self, queue: str) -> Json:
        return self._json("POST", "/queues/remove", body={"queue": queue})

    def reservations(self, tenant: str | None, *, over: bool) -> Json:
        return self._json("GET", "/reservations", {"tenant": tenant, "over": "true" if over else None})

    def create_reservation(self, **fields: Any) -> Json:
        return self._json("POST", "/reservations", body=fields)

    def cancel_reservation(self, reservation: str) -> Json:
        return self._json("POST", "/reservations/cancel", body={"reservation": reservation})

    def grant_credit(self, tenant: str, amount: str, memo: str, idempotency_key: str | None) -> Json:
        body = {"tenant": tenant, "amount": amount, "memo": memo, "idempotency_key": idempotency_key}
        return self._json("POST", "/credits", body=body)

    def _json(self, method: str, path: str, query: dict[str, str | None] | None = None, *, body: Any = None) -> Json:
        raw = self._ask(method, path, query, body=body)
        try:
            document = json.loads(raw)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise Unavailable(f"{self.url} answers, but is not Tidemill's control plane.", hint="Is the port right?")
        return document

    def _ask(
        self,
        method: str,
        path: str,
        query: dict[str, str | None] | None = None,
        *,
        body: Any = None,
        into: IO[bytes] | None = None,
    ) -> bytes:
        """The body of the answer; with `into` it is written there."""
        given = {name: value for name, value in (query or {}).items() if value is not None}
        target = self._parts.path.rstrip("/") + API + path + ("?" + urlencode(given) if given else "")
        headers = {"Authorization": f"Bearer {self._token}", "Accept": "application/json, text/plain"}
        payload = None
        if body is not None:
            payload = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection = connection_to(self.url)
        sent = False
        try:
            connection.connect()
            sent = True
            connection.request(method, target, payload, headers)
            answer = connection.getresponse()
            if into is not None and answer.status < 300:
                while data := answer.read(1 << 20):
                    into.write(data)
            raw = answer.read()
        except (OSError, http.client.HTTPException) as error:
            hint = "Is it running?"
            if sent:
                hint = (
                    "The change may have been made all the same: check before you repeat it."
                    if method == "POST"
                    else ""
                )
            raise Unavailable(f"The platform at {self.url} does not answer ({reason_of(error)}).", hint=hint) from error
        finally:
            connection.close()
        if answer.status >= 300:
            raise self._refused(answer.status, raw)
        return raw

    def _refused(self, status: int, raw: bytes) -> TidemillError:
        try:
            error = json.loads(raw)["error"]
            return RequestRefused(str(error["message"]), hint=str(error["hint"] or ""), param=error["param"])
        except (ValueError, KeyError, TypeError):
            hint = "Is the port right?"
            return Unavailable(f"{self.url} answers {status}, but is not Tidemill's control plane.", hint=hint)


def connection_to(url: str, what: str = "a control plane") -> http.client.HTTPConnection:
    """A connection, not yet opened, to where `what` listens. Raises BadInput for what is no address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"{url!r} is not the address of {what}.", hint="Write http://HOST:PORT.")
    # http.client takes no proxy from the environment, which must not see the token of a local platform.
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        return kind(parts.hostname, parts.port, timeout=TIMEOUT_S)
    except ValueError as error:
        raise BadInput(f"{url!r} is not the address of {what}: {error}.") from error


def reason_of(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
