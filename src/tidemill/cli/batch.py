"""`tidemill batch`"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from tidemill.cli.locate import data_plane_url, running, source
from tidemill.cli.output import complain, grouped, moment, print_json, print_table, print_text
from tidemill.cli.target import HERE, Target
from tidemill.cli.tenant_client import TenantClient
from tidemill.errors import NotFound

app = App(name="batch")

_LOOK_EVERY_S = 2.0
ENDED = ("completed", "failed", "expired", "cancelled")
SHOWN_ERRORS = 20

Key = Annotated[str, Parameter(help="The tenant's API key.", env_var="TIDEMILL_API_KEY")]
Url = Annotated[
    str | None,
    Parameter(
        help="The data plane's address, ending in /v1. [default: that of the platform on the data directory]",
        env_var="TIDEMILL_URL",
    ),
]


@app.command
def submit(
    file: Path,
    /,
    *,
    key: Key,
    endpoint: str = "/v1/chat/completions",
    url: Url = None,
    wait: bool = False,
    target: Target = HERE,
) -> None:
    """Upload a file of requests, one per line, and run them as a batch. Needs the tenant's API key.

    Parameters
    ----------
    file
        A JSON Lines file in the format of OpenAI's Batch API.
    endpoint
        Endpoint of all lines: /v1/chat/completions, /v1/completions, /v1/embeddings or /v1/responses.
    wait
        Wait until the batch has ended.
    """
    client = TenantClient(data_plane_url(target, url), key)
    made = client.create_batch(client.upload(file)["id"], endpoint)
    while wait and made["status"] not in ENDED:
        time.sleep(_LOOK_EVERY_S)
        made = client.batch(made["id"])
    if target.json:
        print_json(made)
        return
    print_text(made["id"])
    if wait:
        complain(f"{made['status']}, {_progress_of_tenant(made)}", kind="note")
    for error in ((made["errors"] or {}).get("data") or [])[:SHOWN_ERRORS]:
        complain(_error_text(error), kind="note")


@app.command
def results(batch: str, /, *, key: Key, errors: bool = False, url: Url = None, target: Target = HERE) -> None:
    """Print the results of a batch, one JSON object per line. Needs the tenant's API key.

    Parameters
    ----------
    batch
        Its id.
    errors
        Print the errors of failed lines instead.
    """
    client = TenantClient(data_plane_url(target, url), key)
    found = client.batch(batch)
    file_id = found["error_file_id" if errors else "output_file_id"]
    if file_id is None:
        what = "no line failed" if errors else "no line has a result"
        if found["status"] not in ENDED:
            raise NotFound(f"The batch is {found['status']}; its results are available when it has ended.")
        raise NotFound(f"The batch is {found['status']}, and {what}.", hint="" if errors else "Look at --errors.")
    if target.json:
        lines = b"".join(client.content(file_id)).splitlines()
        print_json({"results": [json.loads(line) for line in lines if line]})
        return
    sys.stdout.flush()
    for data in client.content(file_id):
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@app.command(name="list")
def list_(*, tenant: str | None = None, open: bool = False, limit: int = 100, target: Target = HERE) -> None:
    """List the batches of all tenants, newest first.

    Parameters
    ----------
    tenant
        Only this tenant's.
    open
        List only batches that have not ended.
    limit
        Maximum number to list.
    """
    found = source(target).batches(tenant, unfinished=open, limit=limit)
    if target.json:
        print_json(found)
        return
    print_table(
        [
            ("Batch", "left"),
            ("Tenant", "left"),
            ("Model", "left"),
            ("Status", "left"),
            ("Lines", "right"),
            ("Done", "right"),
            ("Failed", "right"),
            ("Made (UTC)", "left"),
            ("Ended, or to end (UTC)", "left"),
        ],
        [
            (
                each["id"],
                each["tenant"],
                each["model"] or "",
                each["status"],
                grouped(each["total"]),
                grouped(each["completed"]),
                grouped(each["failed"]),
                moment(each["created_at"]),
                moment(each["ended_at"]) or f"by {moment(each['expires_at'])}",
            )
            for each in found["batches"]
        ],
    )
    if found["next"]:
        complain("there are more; see --limit.", kind="note")


@app.command
def show(batch: str, /, *, target: Target = HERE) -> None:
    """Show a batch: its progress, cost and errors.

    Parameters
    ----------
    batch
        Its id.
    """
    found = source(target).batch(batch)
    if target.json:
        print_json(found)
        return
    lines = [
        ("Batch", found["id"]),
        ("Tenant", f"{found['tenant']}, key {found['key_id']}"),
        ("Requests", f"{found['endpoint']} of {found['model'] or 'several models'}"),
        ("Status", found["status"]),
        ("Lines", f"{grouped(found['total'])}: {grouped(found['completed'])} done, {grouped(found['failed'])} failed"),
        ("Tokens", f"{grouped(found['input_tokens'])} in, {grouped(found['output_tokens'])} out"),
        ("Charge", f"{grouped(found['charge'])} {found['currency']}"),
        ("Made", f"{moment(found['created_at'])} UTC, to end by {moment(found['expires_at'])}"),
        ("Ended", f"{moment(found['ended_at'])} UTC" if found["ended_at"] else "not yet"),
        ("Files", ", ".join(found[name] for name in _FILES if found[name])),
    ]
    for title, text in lines:
        print_text(f"{title:<10}{text}")
    for error in found["errors"][:SHOWN_ERRORS]:
        print_text(f"  {_error_text(error)}")
    if len(found["errors"]) > SHOWN_ERRORS:
        print_text(f"  and {len(found['errors']) - SHOWN_ERRORS} more; see --json")


@app.command
def cancel(batch: str, /, *, target: Target = HERE) -> None:
    """Cancel a batch.

    Lines in flight finish and are billed; the others are not started.

    Parameters
    ----------
    batch
        Its id.
    """
    asked = running(target).cancel_batch(batch)
    if target.json:
        print_json(asked)
        return
    print_text(f"Batch {asked['id']} of {asked['tenant']} is {asked['status']}.")


_FILES = ("input_file_id", "output_file_id", "error_file_id")


def _progress_of_tenant(batch: dict[str, Any]) -> str:
    counts = batch["request_counts"]
    return (
        f"{grouped(counts['completed'])} of {grouped(counts['total'])} lines done, {grouped(counts['failed'])} failed"
    )


def _error_text(error: dict[str, Any]) -> str:
    where = "file" if error["line"] is None else f"line {error['line']}"
    return f"{where}: {error['message']} ({error['code']})"
