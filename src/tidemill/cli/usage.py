"""`tidemill usage`"""

from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import Parameter

from tidemill.cli.locate import source
from tidemill.cli.output import grouped, moment, print_json, print_table, print_text
from tidemill.cli.target import HERE, Target


def usage(
    *,
    tenant: str,
    month: str | None = None,
    records: Annotated[bool, Parameter(negative="")] = False,
    target: Target = HERE,
) -> None:
    """Show what a tenant used and what it cost: exact sums, and with --records each request.

    Parameters
    ----------
    tenant
        The tenant's name or id.
    month
        Billing month such as 2026-11. [default: all time]
    records
        List each request as well.
    """
    found = source(target).usage(tenant, month, records=records)
    if target.json:
        print_json(found)
        return
    when = f"{found['month']}, {found['zone']}" if found["month"] else "all time"
    print_text(f"Usage of {found['tenant']}, {when}\n")
    rows = [(model, *_counts(sums)) for model, sums in found["models"].items()]
    print_table(
        [
            ("Model", "left"),
            ("Requests", "right"),
            ("Prompt", "right"),
            ("of it cached", "right"),
            ("Completion", "right"),
            (f"Charge {found['currency']}", "right"),
        ],
        [*rows, ("Total with device time" if found["devices"] else "Total", *_counts(found))],
        footer=True,
    )
    if "components" in found:
        print_text("")
        _print_components(found)
    if found["devices"]:
        print_text("")
        _print_devices(found)
    print_text(f"\nBalance: {grouped(found['balance'])} {found['currency']}")
    if records:
        print_text("")
        _print_records(found)


def _print_components(found: Mapping[str, Any]) -> None:
    print_table(
        [("Of that", "left"), ("Component", "left"), ("Quantity", "right"), (f"Charge {found['currency']}", "right")],
        [
            (model, key, grouped(row["quantity"]), grouped(row["charge"]))
            for model, sums in found["models"].items()
            for key, row in sums.get("components", {}).items()
        ],
    )


def _print_devices(found: Mapping[str, Any]) -> None:
    print_table(
        [("Devices", "left"), ("Tier", "left"), ("Seconds", "right"), (f"Charge {found['currency']}", "right")],
        [
            (row["kind"], row["tier"], grouped(row["device_seconds"]), grouped(row["charge"]))
            for row in found["devices"]
        ],
    )
    if not found.get("device_records"):
        return
    print_text("")
    print_table(
        [
            ("Job or reservation", "left"),
            ("Attempt", "right"),
            ("Devices", "right"),
            ("Kind", "left"),
            ("Seconds", "right"),
            (f"Charge {found['currency']}", "right"),
            ("Started (UTC)", "left"),
        ],
        [
            (
                row["job_id"] or row["reservation_id"] or "",
                "" if row["attempt"] is None else str(row["attempt"]),
                str(row["devices"]),
                row["kind"],
                grouped(row["device_seconds"]),
                grouped(row["charge"]),
                moment(row["started_at"]),
            )
            for row in found["device_records"]
        ],
    )


def _counts(sums: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "charge")
    return tuple(grouped(sums[name]) for name in names)


def _print_records(found: Mapping[str, Any]) -> None:
    print_table(
        [
            ("Request", "left"),
            ("Model", "left"),
            ("Status", "left"),
            ("Prompt", "right"),
            ("Cached", "right"),
            ("Completion", "right"),
            (f"Charge {found['currency']}", "right"),
            ("Finished (UTC)", "left"),
        ],
        [
            (
                record["request_id"],
                record["model"],
                record["status"] + (", estimated" if record["estimated"] else ""),
                grouped(record["prompt_tokens"]),
                grouped(record["cached_tokens"]),
                grouped(record["completion_tokens"]),
                grouped(record["charge"]),
                moment(record["finished_at"]),
            )
            for record in found["records"]
        ],
    )
