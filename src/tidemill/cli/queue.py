"""`tidemill queue`"""

from cyclopts import App

from tidemill.cli.locate import running, source
from tidemill.cli.output import print_json, print_table, print_text
from tidemill.cli.target import HERE, Target

app = App(name="queue")


@app.command(name="set")
def set_(
    name: str,
    /,
    *,
    tenant: str | None = None,
    quota: int = 0,
    borrow: int | None = None,
    weight: int = 1,
    target: Target = HERE,
) -> None:
    """Create or change a job queue. A tenant's own queue has the tenant's name.

    Parameters
    ----------
    name
        The queue's name.
    tenant
        Accept only this tenant's jobs. [default: all tenants' jobs]
    quota
        Guaranteed devices; other queues may borrow them while they are unused.
    borrow
        Maximum number of devices beyond the quota. [default: no maximum]
    weight
        Share of the devices to borrow, relative to other queues.
    """
    made = running(target).set_queue(name=name, tenant=tenant, quota=quota, borrow=borrow, weight=weight)
    if target.json:
        print_json(made)
        return
    borrows = "as much as others leave" if made["borrow"] is None else f"at most {made['borrow']}"
    print_text(f"{made['name']} has {made['quota']} devices and borrows {borrows}.")


@app.command(name="list")
def list_(*, target: Target = HERE) -> None:
    """List the queues."""
    found = source(target).queues()
    if target.json:
        print_json(found)
        return
    print_table(
        [("Queue", "left"), ("Tenant", "left"), ("Quota", "right"), ("Borrows", "right"), ("Weight", "right")],
        [
            (
                each["name"],
                each["tenant"] or "all",
                str(each["quota"]),
                "what is left" if each["borrow"] is None else str(each["borrow"]),
                str(each["weight"]),
            )
            for each in found["queues"]
        ],
    )


@app.command
def remove(name: str, /, *, target: Target = HERE) -> None:
    """Remove a queue that has no unfinished jobs.

    Parameters
    ----------
    name
        The queue's name.
    """
    removed = running(target).remove_queue(name)
    if target.json:
        print_json(removed)
    else:
        print_text(f"The queue {removed['name']} is removed.")
