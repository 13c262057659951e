"""The plan of the fleet: what to start, stop and preempt now, and why, from a snapshot.

In the order of importance: what tenants have reserved; replicas for people; replicas for batches whose deadlines need
them; jobs, by quota, share, deadline and age; and batches on whatever is left. Each takes what is free, else what is
coming free, else what somebody less important has (`tides.preemption`). A plan is made anew each time and remembers
nothing: executed, it leads to a snapshot whose plan asks for nothing more, if nothing else happens.
"""

from tidemill.tides.backfill import fill, keep_deadlines
from tidemill.tides.explain import explain
from tidemill.tides.jobs import offer_jobs, run_jobs
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.reservations import keep_reservations, run_reserved_jobs
from tidemill.tides.rules import RULES, Rules
from tidemill.tides.serving import Serving, offer_replicas, scale_down, scale_up
from tidemill.tides.sleepers import Sleepers
from tidemill.tides.state import DevicePromise, FleetSnapshot, JobPhase, Plan


def plan(snapshot: FleetSnapshot, rules: Rules = RULES) -> Plan:
    """Make a plan from a snapshot. Every device has at most one holder in it."""
    builder = PlanBuilder(snapshot, rules)
    alive: dict[str, object] = {f"model {model.name}": None for model in snapshot.models}
    alive |= {f"job {job.id}": None for job in snapshot.jobs if job.phase is JobPhase.QUEUED}
    alive |= {f"batches of {backlog.model}": None for backlog in snapshot.backlogs}
    alive |= {f"reservation {each.id}": None for each in snapshot.reservations if each.end > snapshot.now}
    builder.occupancy.keep(snapshot.promises, alive)
    serving, sleepers = Serving(builder), Sleepers(builder)
    offer_replicas(builder, serving)
    offer_jobs(builder)
    keep_reservations(builder)
    run_reserved_jobs(builder)
    scale_down(builder, serving)
    scale_up(builder, serving, sleepers)
    for model in snapshot.models:
        builder.occupancy.release(f"model {model.name}")
    keep_deadlines(builder, serving)
    run_jobs(builder)
    builder.occupancy.release_all()
    fill(builder, serving)
    sleepers.settle()
    return Plan(
        start_replicas=tuple(builder.start_replicas),
        stop_replicas=tuple(builder.stop_replicas),
        start_jobs=tuple(builder.start_jobs),
        preempt_jobs=tuple(builder.preempt_jobs),
        lend_replicas=tuple(builder.lend_replicas.values()),
        reserve=tuple(builder.reserve),
        promises=tuple(DevicePromise(device, work) for device, work in builder.occupancy.promised.items()),
        devices=explain(builder, serving, sleepers),
        waiting=tuple(builder.waiting),
    )
