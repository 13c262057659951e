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
    """Put limits in force, each in the place of one of its kind on the same tenant, key and model.

    Parameters
    ----------
    tenant
        The tenant's name or id.
    key
        Only what this key asks for: the key itself, or its id from `tidemill key list`.
    model
        Only what is asked of this model.
    rpm
        Requests a minute.
    tpm
        Tokens a minute, of prompts and answers.
    concurrency
        Requests at a time.
    budget
        Money, in the tenant's currency, e.g. 100 or 0.25.
    per
        Of the budget: day or month. [default: month]
    soft
        Of the budget: warn when so many percent of it are spent.
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
    """List the limits and what is used of them.

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
    """Take a limit out of force.

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
