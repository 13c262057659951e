"""`tidemill margin`"""

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from tidemill.cli.locate import running
from tidemill.cli.output import grouped, print_json, print_table, print_text
from tidemill.cli.target import HERE, Target


def margin(
    *,
    month: Annotated[str | None, Parameter(help="Month such as 2026-11. [default: the current one]")] = None,
    target: Target = HERE,
) -> None:
    """Show each model's revenue by tenant, and its cost including idle time and upstreams."""
    found = running(target).margin(month)
    if target.json:
        print_json(found)
        return
    print_text(f"Margin of {found['month']} in {found['currency']}, as of {found['as_of'][:16].replace('T', ' ')}Z\n")
    costs = ["busy_cost", "idle_cost"]
    if found["upstream_cost"].strip("0."):
        costs.append("upstream_cost")
    rows = []
    for model in found["models"]:
        rows += [_row(model["model"], line["tenant"], line, costs) for line in model["tenants"]]
        rows.append(_row(model["model"], "in all", model, costs))
    rows.append(_row("all models", "", found, costs))
    print_table(
        [
            ("Model", "left"),
            ("Tenant", "left"),
            ("Revenue", "right"),
            *((_TITLES[cost], "right") for cost in costs),
            ("Margin", "right"),
            ("Ratio", "right"),
        ],
        rows,
        footer=True,
    )
    for currency, amount in found["other_currencies"].items():
        print_text(f"\nNot in the margin: revenue of {grouped(amount)} {currency}")


_TITLES = {"busy_cost": "Cost, busy", "idle_cost": "Cost, idle", "upstream_cost": "Cost, upstream"}


def _row(model: str, tenant: str, part: dict[str, object], costs: Sequence[str]) -> tuple[str, ...]:
    amounts = (grouped(str(part[name])) for name in ("revenue", *costs, "gross_margin"))
    ratio = part["ratio"]
    return (model, tenant, *amounts, f"{ratio:.1%}" if isinstance(ratio, float) else "")
