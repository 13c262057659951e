"""`tidemill fleet`"""

from typing import Any

from cyclopts import App

from tidemill.cli.locate import running
from tidemill.cli.output import grouped, moment, print_json, print_table, print_text
from tidemill.cli.target import HERE, Target

app = App(name="fleet")

GIB = 2**30


@app.command(name="list")
def list_(*, target: Target = HERE) -> None:
    """List the replicas, and the plan for each model. Load is in prefill tokens per second."""
    found = running(target).fleet()
    if target.json:
        print_json(found)
        return
    print_table(
        [
            ("Replica", "left"),
            ("State", "left"),
            ("Devices", "left"),
            ("Requests", "right"),
            ("Lines", "right"),
            ("For", "left"),
            ("Why", "left"),
        ],
        [
            (
                each["name"],
                each["phase"],
                " ".join(each["devices"]),
                str(each["requests"]),
                str(each["lines"]),
                _purpose(each),
                each["why"],
            )
            for each in found["replicas"]
        ],
    )
    print_text("")
    print_table(
        [
            ("Model", "left"),
            ("Ready", "right"),
            ("Of", "right"),
            ("Now", "right"),
            ("Expected", "right"),
            ("High", "right"),
            ("A replica does", "right"),
            ("Starts in", "right"),
            ("Late", "right"),
            ("Waiting", "right"),
        ],
        [
            (
                each["name"],
                str(each["ready"]),
                f"{each['min_replicas']} to {each['max_replicas']}",
                grouped(round(each["now"])),
                grouped(round(each["expected"])),
                grouped(round(each["high"])),
                grouped(round(each["capacity"])) if each["capacity"] else "not known yet",
                f"{each['startup_s']:.0f} s",
                f"{each['late']:.1%}",
                str(each["waiting"]),
            )
            for each in found["models"]
        ],
    )


@app.command
def devices(*, target: Target = HERE) -> None:
    """List the devices and what uses them."""
    found = running(target).fleet()
    if target.json:
        print_json({"nodes": found["nodes"], "devices": found["devices"]})
        return
    print_table(
        [("Device", "left"), ("Kind", "left"), ("Memory", "right"), ("Holder", "left"), ("Reserved", "left")],
        [
            (
                each["device"],
                each["kind"],
                f"{each['memory_bytes'] / GIB:.0f} GiB" if each["memory_bytes"] else "",
                each["holder"],
                each["reserved_by"] or "",
            )
            for each in found["devices"]
        ],
    )


@app.command
def why(*, target: Target = HERE) -> None:
    """Show what each device does, until when and why, and what waiting work is waiting for."""
    found = running(target).fleet_why()
    if target.json:
        print_json(found)
        return
    print_table(
        [("Device", "left"), ("Holder", "left"), ("Until (UTC)", "left"), ("Why", "left")],
        [(each["device"], each["holder"], moment(each["until"]), each["why"]) for each in found["devices"]],
    )
    if found["waiting"]:
        print_text("")
        print_table([("Waiting", "left"), ("For", "left")], [(each["work"], each["why"]) for each in found["waiting"]])


@app.command
def drain(name: str, /, *, why: str = "", target: Target = HERE) -> None:
    """Drain a node or a device: nothing new starts there.

    What runs there goes on elsewhere, or ends in order.

    Parameters
    ----------
    name
        A node, or a device as `tidemill fleet devices` names it.
    why
        Reason, shown by `tidemill fleet why`.
    """
    done = running(target).drain(name, why)
    if target.json:
        print_json(done)
        return
    print_text(f"{done['name']} is drained. `tidemill fleet undrain {done['name']}` puts it back.")


@app.command
def undrain(name: str, /, *, target: Target = HERE) -> None:
    """Undo a drain: allow new work on a node or a device.

    Parameters
    ----------
    name
        What was drained.
    """
    done = running(target).undrain(name)
    if target.json:
        print_json(done)
        return
    print_text(f"{done['name']} is back.")


def _purpose(replica: dict[str, Any]) -> str:
    if replica["beside"]:
        return "lines, beside another"
    return "lines" if replica["batch_only"] else "people"
