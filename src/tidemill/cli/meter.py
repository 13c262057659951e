"""`tidemill meter`"""

from cyclopts import App

from tidemill.cli.locate import running
from tidemill.cli.output import print_json, print_text
from tidemill.cli.target import HERE, Target

app = App(name="meter")


@app.command
def reconcile(*, target: Target = HERE) -> None:
    """Compare the usage records with the engines' own token counters, and list the differences."""
    platform = running(target)
    if target.json:
        print_json(platform.reconcile())
    else:
        print_text(platform.reconcile_text())
