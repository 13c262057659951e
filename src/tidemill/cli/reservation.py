"""`tidemill reservation`"""

from typing import Annotated

from cyclopts import App, Parameter

from tidemill.cli.locate import running, source
from tidemill.cli.output import grouped, moment, print_json, print_table, print_text
from tidemill.cli.target import HERE, Target

app = App(name="reservation")


@app.command
def create(
    *,
    tenant: str,
    kind: str,
    devices: int,
    to: str,
    from_: Annotated[str, Parameter(name="--from")] = "now",
    lend: Annotated[bool, Parameter(negative="")] = False,
    price: str | None = None,
    target: Target = HERE,
) -> None:
    """Reserve devices for a tenant for a period. The tenant pays for them, used or not.

    Parameters
    ----------
    tenant
        The tenant's name or id.
    kind
        The kind of devices, such as h800-sxm.
    devices
        Number of devices.
    to
        End: a duration such as 30d, a date (to its end) or an instant.
    from_
        Start: now, a time from now such as 2h, a date or an instant.
    lend
        Lend idle devices to preemptible work, with the tenant's consent.
    price
        Price per device and hour, in the tenant's currency. [default: the standard price of the kind]
    """
    made = running(target).create_reservation(
        tenant=tenant, kind=kind, devices=devices, start=from_, end=to, lend=lend, price=price
    )
    if target.json:
        print_json(made)
        return
    print_text(
        f"{made['id']}: {made['devices']} {made['kind']} for {made['tenant']} from {moment(made['starts_at'])} to"
        f" {moment(made['ends_at'])} UTC, at {grouped(made['price_per_hour'])} {made['currency']} an hour each."
    )


@app.command(name="list")
def list_(
    *,
    tenant: str | None = None,
    over: Annotated[bool, Parameter(name="--all", negative="")] = False,
    target: Target = HERE,
) -> None:
    """List reservations by start time.

    Parameters
    ----------
    tenant
        Only this tenant's.
    over
        Include reservations that have ended.
    """
    found = source(target).reservations(tenant, over=over)
    if target.json:
        print_json(found)
        return
    print_table(
        [
            ("Reservation", "left"),
            ("Tenant", "left"),
            ("Kind", "left"),
            ("Devices", "right"),
            ("From (UTC)", "left"),
            ("To", "left"),
            ("An hour", "right"),
            ("", "left"),
            ("State", "left"),
            ("", "left"),
        ],
        [
            (
                each["id"],
                each["tenant"],
                each["kind"],
                str(each["devices"]),
                moment(each["starts_at"]),
                moment(each["ends_at"]),
                f"{grouped(each['price_per_hour'])} {each['currency']}",
                "lent when idle" if each["lend"] else "",
                each["state"],
                each["reason"],
            )
            for each in found["reservations"]
        ],
    )


@app.command
def cancel(reservation: str, /, *, target: Target = HERE) -> None:
    """Cancel a reservation. It is billed until now.

    Parameters
    ----------
    reservation
        Its id, from `tidemill reservation list`.
    """
    cancelled = running(target).cancel_reservation(reservation)
    if target.json:
        print_json(cancelled)
    else:
        print_text(f"{cancelled['id']} of {cancelled['tenant']} is cancelled.")
