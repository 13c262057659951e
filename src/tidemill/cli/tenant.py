"""`tidemill tenant`"""

from cyclopts import App

from tidemill.cli.locate import running, source
from tidemill.cli.output import complain, grouped, moment, print_json, print_table, print_text
from tidemill.cli.target import HERE, Target

app = App(name="tenant")


@app.command
def create(name: str, /, *, currency: str | None = None, target: Target = HERE) -> None:
    """Create a tenant.

    Parameters
    ----------
    name
        Unique name of 1 to 128 printable characters.
    currency
        Currency that the tenant pays in, e.g. CNY. [default: the installation's currency]
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
    """Set a tenant's weight, which decides its share of a full model.

    Parameters
    ----------
    name
        The tenant's name or id.
    weight
        From 1 to 1000; 1 for a new tenant. A tenant with weight 3 gets three times the share of one with 1.
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
