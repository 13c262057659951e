"""`tidemill credit`"""

from typing import Annotated

from cyclopts import App, Parameter

from tidemill.cli.locate import running
from tidemill.cli.output import grouped, print_json, print_text
from tidemill.cli.target import HERE, Target

app = App(name="credit")


@app.command
def grant(
    *,
    tenant: str,
    amount: Annotated[str, Parameter(allow_leading_hyphen=True)],
    memo: str = "",
    idempotency_key: str | None = None,
    target: Target = HERE,
) -> None:
    """Grant credit to a tenant.

    Parameters
    ----------
    tenant
        The tenant's name or id.
    amount
        Amount in the tenant's currency, e.g. 100 or 0.25.
    memo
        Text for the invoice.
    idempotency_key
        Any text of your choice: with it, the grant is made only once, even if the command is repeated.
    """
    granted = running(target).grant_credit(tenant, amount, memo, idempotency_key)
    if target.json:
        print_json(granted)
        return
    said = "was granted before" if granted["replayed"] else "is granted"
    print_text(
        f"{grouped(granted['amount'])} {granted['currency']} {said} to {granted['tenant']}"
        f" ({granted['transaction_id']}). Balance: {grouped(granted['balance'])} {granted['currency']}."
    )
