"""`tidemill ledger`"""

from cyclopts import App

from tidemill.cli.locate import source
from tidemill.cli.output import grouped, print_json, print_text
from tidemill.cli.target import HERE, Target

app = App(name="ledger")

DIFFERS = 1
"""Exit code when something differs."""


@app.command
def check(*, target: Target = HERE) -> int:
    """Check that the ledger is consistent: balances, transactions, budgets and device meters.

    Exit code 0 if it is, 1 if anything differs. It reads all entries, so a large store takes minutes.
    """
    found = source(target).check_ledger()
    if target.json:
        print_json(found)
    else:
        counts = ", ".join(f"{grouped(count)} {name}" for name, count in found["checked"].items())
        lines = found["differences"]
        print_text("\n".join([*lines, f"{'differs' if lines else 'equal'}: {counts} checked"]))
    return 0 if found["equal"] else DIFFERS
