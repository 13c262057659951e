"""The state of the platform and of its models, as the control plane shows them."""

from collections.abc import Iterable, Mapping
from datetime import datetime

import msgspec

from tidemill.app.config.schema.models import ModelConfig
from tidemill.gateway.routing.models import ModelSpec
from tidemill.ledger.money import Nanos, parse_amount
from tidemill.ledger.pricing import Price


class PlatformState(msgspec.Struct, frozen=True):
    """How the platform does."""

    version: str
    state: str
    started_at: datetime
    gateway_url: str
    workers_ready: int
    workers_total: int


class ServedModelState(msgspec.Struct, frozen=True):
    """A model that is served."""

    name: str
    engine: str
    state: str
    replicas_ready: int
    replicas_total: int
    endpoint: str | None
    cost_per_hour: Nanos
    token_cost: Price | None = None


def model_states(specs: Iterable[ModelSpec], models: Mapping[str, ModelConfig]) -> list[ServedModelState]:
    """The states of all models."""
    states = []
    for spec in specs:
        ready = sum(replica.ready for replica in spec.replicas)
        states.append(
            ServedModelState(
                name=spec.name,
                engine=spec.engine,
                state="ready" if ready else "starting",
                replicas_ready=ready,
                replicas_total=len(spec.replicas),
                endpoint=next((replica.base_url for replica in spec.replicas if replica.ready), None),
                cost_per_hour=parse_amount(models[spec.name].cost_per_hour),
                token_cost=None if spec.cost is None else spec.cost.price,
            )
        )
    return states


def reachable(host: str) -> str:
    """The address of this machine where something listens on `host`."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
