"""`tidemill invoice`"""

from tidemill.cli.locate import source
from tidemill.cli.output import print_json, print_text
from tidemill.cli.target import HERE, Target


def invoice(*, tenant: str, month: str | None = None, target: Target = HERE) -> None:
    """Print a tenant's invoice for a month, as text; a draft until the month is over.

    Parameters
    ----------
    tenant
        The tenant's name or id.
    month
        Billing month such as 2026-11. [default: the current one, as a draft]
    """
    found = source(target)
    if target.json:
        print_json(found.invoice(tenant, month))
    else:
        print_text(found.invoice_text(tenant, month))
