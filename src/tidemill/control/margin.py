"""The margin of a month, by model and tenant.

What each model brought in, against what its replicas cost, idle time included, and what upstreams bill for its tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection

from tidemill.control.names import read_month
from tidemill.control.platform import PlatformModel
from tidemill.control.queries import Json
from tidemill.errors import BadInput
from tidemill.ledger.costing import MarginKey, MarginLine, MarginReport
from tidemill.ledger.costing import margin as margin_of
from tidemill.ledger.money import ZERO, Nanos, format_amount
from tidemill.ledger.pricing import Price, cost_of
from tidemill.store.prices import price_versions
from tidemill.store.tenants import list_tenants
from tidemill.store.usage import DeviceUse, device_use

NS_PER_S = 1_000_000_000


def margin(
    connection: Connection,
    running: Sequence[PlatformModel],
    *,
    month: str,
    zone: str,
    currency: str,
    now: datetime,
) -> Json:
    """The margin of `month` up to `now`, in the installation's currency.

    A model's cost counts its replicas and its upstream's prices of now; the replicas from the day of the model's first
    price (before that it was not for sale).
    Tenants who pay in another currency bear their share of the cost, but their revenue is told apart in
    `other_currencies`, since no exchange rate is known here; `gross_margin` is without it. Raises BadInput.
    """
    period = read_month(month, zone)
    if now < period.start:
        raise BadInput(f"month: {period.title} has not begun yet.", param="month")
    end = min(now, period.end)
    first_sold: dict[str, datetime] = {}
    for version in price_versions(connection):
        first_sold.setdefault(version.model, version.valid_from)
    used = device_use(connection, start=period.start, end=end)
    names = {tenant.tenant_id: tenant.name for tenant in list_tenants(connection)}
    views = {view.name: view for view in running}
    reports: dict[str, tuple[MarginReport, Nanos]] = {}
    upstream: dict[str, dict[str, int]] = {}
    """By model, then by tenant."""
    for model in sorted(views.keys() | {row.model for row in used}):
        view = views.get(model)
        cost = ZERO if view is None else view.cost_per_hour
        start = min(max(period.start, first_sold.get(model, period.start)), end)
        rows = [row for row in used if row.model == model]
        report = margin_of(
            _by_key((row.tenant_id, model, row.charge if row.currency == currency else 0) for row in rows),
            _by_key((row.tenant_id, model, row.device_ns) for row in rows),
            cost_per_device_hour=cost,
            devices=0 if view is None else view.replicas_total,
            start=start,
            end=end,
        )
        reports[model] = report, cost
        upstream[model] = _upstream_costs(rows, None if view is None else view.token_cost)
    whole = [report for report, _ in reports.values()]
    revenue = sum(report.revenue for report in whole)
    return {
        "month": period.month,
        "zone": zone,
        "currency": currency,
        "as_of": end.isoformat(),
        **_sums(
            revenue,
            sum(report.busy_cost for report in whole),
            sum(report.idle_cost for report in whole),
            sum(sum(costs.values()) for costs in upstream.values()),
        ),
        "other_currencies": _other_revenue(used, currency),
        "models": [
            _model_json(
                model,
                report,
                cost,
                upstream[model],
                replicas=views[model].replicas_total if model in views else 0,
                names=names,
            )
            for model, (report, cost) in reports.items()
        ],
    }


def _by_key(rows: Iterable[tuple[str, str, int]]) -> dict[MarginKey, Nanos]:
    sums: dict[MarginKey, Nanos] = {}
    for tenant_id, model, amount in rows:
        key = MarginKey(tenant_id, model)
        sums[key] = Nanos(sums.get(key, ZERO) + amount)
    return sums


def _other_revenue(used: Iterable[DeviceUse], currency: str) -> dict[str, str]:
    others: dict[str, int] = {}
    for row in used:
        if row.currency != currency and row.charge:
            others[row.currency] = others.get(row.currency, 0) + row.charge
    return {code: format_amount(others[code]) for code in sorted(others)}


def _upstream_costs(rows: Iterable[DeviceUse], cost: Price | None) -> dict[str, int]:
    """What a model's usage is billed at by whom it is bought from, by tenant."""
    costs: dict[str, int] = {}
    if cost is not None:
        for row in rows:
            of_row = cost_of(row.quantities, cost)
            costs[row.tenant_id] = costs.get(row.tenant_id, 0) + of_row
    return costs


def _sums(revenue: int, busy_cost: int, idle_cost: int, upstream_cost: int) -> Json:
    gross = revenue - busy_cost - idle_cost - upstream_cost
    return {
        "revenue": format_amount(revenue),
        "cost": format_amount(busy_cost + idle_cost + upstream_cost),
        "busy_cost": format_amount(busy_cost),
        "idle_cost": format_amount(idle_cost),
        "upstream_cost": format_amount(upstream_cost),
        "gross_margin": format_amount(gross),
        "ratio": round(gross / revenue, 4) if revenue else None,
    }


def _model_json(
    model: str,
    report: MarginReport,
    cost: Nanos,
    upstream: Mapping[str, int],
    *,
    replicas: int,
    names: dict[str, str],
) -> Json:
    return {
        "model": model,
        "replicas": replicas,
        "cost_per_hour": format_amount(cost),
        "since": report.start.isoformat(),
        **_sums(report.revenue, report.busy_cost, report.idle_cost, sum(upstream.values())),
        "fill": None if report.fill is None else round(report.fill, 4),
        "tenants": [_line_json(line, upstream.get(line.key.tenant_id, 0), names) for line in report.lines],
    }


def _line_json(line: MarginLine, upstream_cost: int, names: dict[str, str]) -> Json:
    return {
        "tenant": names.get(line.key.tenant_id, line.key.tenant_id),
        "device_seconds": round(line.device_ns / NS_PER_S, 6),
        **_sums(line.revenue, line.busy_cost, line.idle_cost, upstream_cost),
        "contribution": format_amount(line.contribution - upstream_cost),
    }
