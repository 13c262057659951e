"""`tidemill tenant`"""

from cyclopts import App

from tidemill.cli.locate import running, source
from tidemill.cli.output import complain, grouped, moment, print_json, print_table, print_text
from tidemill.cli.target import HERE, Target

app = App(name="tenant")


@app.command
def create(name: str, /, *, currency: str | None = None, target: Target = HERE) -> None:
    """Make a tenant.

    Parameters
    ----------
    name
        1 to 128 printable characters, unlike any other tenant's.
    currency
        What the tenant pays in, e.g. CNY; the installation's currency when left out.
    """
    made = running(target).create_tenant(name, currency)
    if target.json:
        print_json(made)
        return
    print_text(f"Created tenant {made['name']} ({made['id']}, {made['currency']}).")
    if made["warning"]:
        complain(made["warning"], kind="note")


@app.command
def weight(name: str, weight: int, /, *, target: Target = HERE) -> None:
    """Give a tenant another share of models that are full.

    Parameters
    ----------
    name
        The tenant's name or id.
    weight
        From 1 to 1000. Every tenant begins with 1; with 3 it gets three times as much as one with 1.
    """
    changed = running(target).set_weight(name, weight)
    if target.json:
        print_json(changed)
        return
    print_text(f"Tenant {changed['name']} has weight {changed['weight']}.")


@app.command(name="list")
def list_(*, target: Target = HERE) -> None:
    """List the tenants and their balances."""
    found = source(target).tenants()
    if target.json:
        print_json(found)
        return
    print_table(
        [("Tenant", "left"), ("Balance", "right"), ("", "left"), ("Since (UTC)", "left"), ("Id", "left")],
        [
            (each["name"], grouped(each["balance"]), each["currency"], moment(each["created_at"]), each["id"])
            for each in found["tenants"]
        ],
    )
