"""The plan of the fleet: from a snapshot, what is to be started, stopped and preempted now, and why.

In the order of importance: what tenants have reserved; replicas for people; replicas for batches whose deadlines need
them; jobs, by quota, share, deadline and age; and batches on whatever is left. Each takes what is free, else what is
coming free, else what somebody less important has. A plan is made anew each time and remembers nothing: executed, it
leads to a snapshot whose plan asks for nothing more, if nothing else happens.
"""

from tidemill.tides.backfill import fill, keep_deadlines
from tidemill.tides.explain import explain
from tidemill.tides.jobs import offer_jobs, run_jobs
from tidemill.tides.plan_builder import PlanBuilder
from tidemill.tides.reservations import keep_reservations, run_reserved_jobs
from tidemill.tides.rules import RULES, Rules
from tidemill.tides.serving import Serving, give_up, offer_replicas, serve_people
from tidemill.tides.sleepers import Sleepers
from tidemill.tides.state import DevicePromise, FleetSnapshot, JobPhase, Plan


def plan(snapshot: FleetSnapshot, rules: Rules = RULES) -> Plan:
    """What to do now. Every device of the snapshot is given to one holder at the most."""
    draft = PlanBuilder(snapshot, rules)
    alive: dict[str, object] = {f"model {model.name}": None for model in snapshot.models}
    alive |= {f"job {job.id}": None for job in snapshot.jobs if job.phase is JobPhase.QUEUED}
    alive |= {f"batches of {backlog.model}": None for backlog in snapshot.backlogs}
    alive |= {f"reservation {each.id}": None for each in snapshot.reservations if each.end > snapshot.now}
    draft.board.keep(snapshot.promises, alive)
    serving, sleepers = Serving(draft), Sleepers(draft)
    offer_replicas(draft, serving)
    offer_jobs(draft)
    keep_reservations(draft)
    run_reserved_jobs(draft)
    give_up(draft, serving)
    serve_people(draft, serving, sleepers)
    for model in snapshot.models:
        draft.board.release(f"model {model.name}")
    keep_deadlines(draft, serving)
    run_jobs(draft)
    draft.board.release_all()
    fill(draft, serving)
    sleepers.settle()
    return Plan(
        start_replicas=tuple(draft.start_replicas),
        stop_replicas=tuple(draft.stop_replicas),
        start_jobs=tuple(draft.start_jobs),
        preempt_jobs=tuple(draft.preempt_jobs),
        turn_replicas=tuple(draft.turn_replicas.values()),
        reserve=tuple(draft.reserve),
        promises=tuple(DevicePromise(device, work) for device, work in draft.board.promised.items()),
        devices=explain(draft, serving, sleepers),
        waiting=tuple(draft.waiting),
    )
