"""`tidemill limit`"""

from typing import Any

from cyclopts import App

from tidemill.cli.locate import running, source
from tidemill.cli.output import grouped, moment, print_json, print_table, print_text
from tidemill.cli.target import HERE, Target

app = App(name="limit")


@app.command(name="set")
def set_(
    *,
    tenant: str,
    key: str | None = None,
    model: str | None = None,
    rpm: int | None = None,
    tpm: int | None = None,
    concurrency: int | None = None,
    budget: str | None = None,
    per: str | None = None,
    soft: int | None = None,
    target: Target = HERE,
) -> None:
    """Set limits. Each replaces the limit of the same kind on the same tenant, key and model.

    Parameters
    ----------
    tenant
        The tenant's name or id.
    key
        Limit only this key: the key itself, or its id from `tidemill key list`.
    model
        Limit only requests for this model.
    rpm
        Requests per minute.
    tpm
        Tokens per minute, of prompts and answers.
    concurrency
        Concurrent requests.
    budget
        Budget in the tenant's currency, e.g. 100 or 0.25.
    per
        Period of the budget: day or month. [default: month]
    soft
        Percentage of the budget at which to warn.
    """
    made = running(target).set_limits(
        tenant=tenant,
        key=key,
        model=model,
        rpm=rpm,
        tpm=tpm,
        concurrency=concurrency,
        budget=budget,
        per=per,
        soft_percent=soft,
    )
    if target.json:
        print_json(made)
        return
    for each in made["limits"]:
        print_text(f"{each['tenant']}{_scope(each)} has {_text(each)} ({each['id']}).")


@app.command(name="list")
def list_(*, tenant: str | None = None, target: Target = HERE) -> None:
    """List the limits and how much of each is used.

    Parameters
    ----------
    tenant
        Only this tenant's.
    """
    found = source(target).limits(tenant)
    if target.json:
        print_json(found)
        return
    print_table(
        [
            ("Tenant", "left"),
            ("Key", "left"),
            ("Model", "left"),
            ("Limit", "left"),
            ("Used", "right"),
            ("", "left"),
            ("Next period (UTC)", "left"),
            ("Id", "left"),
        ],
        [
            (
                each["tenant"],
                each["key"] or "all",
                each["model"] or "all",
                _text(each),
                grouped(each["used"] if each["spent"] is None else each["spent"]),
                "soft limit reached" if each["warned"] else "",
                moment(each["ends_at"]),
                each["id"],
            )
            for each in found["limits"]
        ],
    )


@app.command
def remove(limit: str, /, *, target: Target = HERE) -> None:
    """Remove a limit.

    Parameters
    ----------
    limit
        Its id, from `tidemill limit list`.
    """
    removed = running(target).remove_limit(limit)
    if target.json:
        print_json(removed)
        return
    print_text(f"{removed['tenant']}{_scope(removed)} no longer has {removed['text']}.")


def _text(limit: dict[str, Any]) -> str:
    soft = limit["soft_percent"]
    return str(limit["text"]) if soft is None else f"{limit['text']}, with a warning at {soft}%"


def _scope(limit: dict[str, Any]) -> str:
    key = f" with key {limit['key']}" if limit["key"] else ""
    return f"{key} for {limit['model']}" if limit["model"] else key
