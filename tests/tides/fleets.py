"""Small fleets for tests of the plan: how they are written down, what carries a plan out, and what must always hold."""

from collections import Counter
from collections.abc import Sequence

import msgspec
from hypothesis import strategies as st

from tidemill.tides.state import (
    BacklogView,
    Demand,
    DeviceView,
    FleetSnapshot,
    JobPhase,
    JobView,
    ModelView,
    Phase,
    Plan,
    QueueView,
    ReplicaView,
    ReservationView,
)

NOW = 1_000_000.0


def devices(*nodes: int, kind: str = "h100", first: int = 0) -> tuple[DeviceView, ...]:
    """Nodes with so many devices each."""
    return tuple(
        DeviceView(f"n{number}/{index}", f"n{number}", kind)
        for number, count in enumerate(nodes, first)
        for index in range(count)
    )


def snapshot(
    views: Sequence[DeviceView],
    *,
    models: Sequence[ModelView] = (),
    replicas: Sequence[ReplicaView] = (),
    jobs: Sequence[JobView] = (),
    queues: Sequence[QueueView] = (),
    reservations: Sequence[ReservationView] = (),
    backlogs: Sequence[BacklogView] = (),
    now: float = NOW,
) -> FleetSnapshot:
    return FleetSnapshot(
        now=now,
        devices=tuple(views),
        models=tuple(models),
        replicas=tuple(replicas),
        jobs=tuple(jobs),
        queues=tuple(queues),
        reservations=tuple(reservations),
        backlogs=tuple(backlogs),
    )


def job(name: str, count: int = 1, on: Sequence[str] = (), **more: object) -> JobView:
    """A job; with devices it runs, since an hour unless it is said otherwise."""
    start = {"phase": JobPhase.RUNNING, "started_at": NOW - 3600} if on else {}
    fields = {"id": name, "tenant": "acme", "queue": "default", "submitted_at": NOW - 7200, **start, **more}
    return JobView(devices=count, on=tuple(on), **fields)  # type: ignore[arg-type]


def replica(name: str, model: str, *on: str, phase: Phase = Phase.READY, **more: object) -> ReplicaView:
    return ReplicaView(id=name, model=model, devices=on, phase=phase, **more)  # type: ignore[arg-type]


def model(name: str = "qwen", work: float = 0.0, **more: object) -> ModelView:
    """A model whose replicas do 1,000 tokens of work a second each."""
    fields = {"capacity": 1000.0, "max_replicas": 100, "demand": Demand(work, work), **more}
    return ModelView(name=name, **fields)  # type: ignore[arg-type]


def carried_out(before: FleetSnapshot, plan: Plan) -> FleetSnapshot:
    """The snapshot right after a plan was carried out."""
    lent = {each.replica: each.batch_only for each in plan.lend_replicas}
    stopped = {stop.replica for stop in plan.stop_replicas}
    dozing = {stop.replica for stop in plan.stop_replicas if stop.sleep}
    woken = {start.wake for start in plan.start_replicas if start.wake is not None}
    preempted = {each.job for each in plan.preempt_jobs}
    started = {each.job: each.devices for each in plan.start_jobs}
    replace = msgspec.structs.replace
    replicas = [
        replace(
            each,
            phase=Phase.DRAINING if each.id in stopped else Phase.WARMING if each.id in woken else each.phase,
            dozing=each.id in dozing,
            batch_only=lent.get(each.id, each.batch_only),
        )
        for each in before.replicas
    ]
    taken = {each.id for each in before.replicas}
    for start in plan.start_replicas:
        if start.wake is not None:
            continue
        name = f"{start.model}@{start.devices[0]}@{before.now:.0f}"
        assert name not in taken
        replicas.append(
            ReplicaView(name, start.model, start.devices, Phase.STARTING, since=before.now, batch_only=start.batch_only)
        )
    jobs = []
    for each in before.jobs:
        if each.id in started:
            each = replace(each, phase=JobPhase.RUNNING, on=started[each.id], started_at=before.now)
        elif each.id in preempted:
            each = replace(each, phase=JobPhase.STOPPING)
        jobs.append(each)
    marks = {each.id: each.reserved_by for each in before.devices}
    for reserve in plan.reserve:
        marks = {device: None if name == reserve.reservation else name for device, name in marks.items()}
        marks |= dict.fromkeys(reserve.devices, reserve.reservation)
    views = tuple(replace(each, reserved_by=marks[each.id]) for each in before.devices)
    return replace(before, devices=views, replicas=tuple(replicas), jobs=tuple(jobs), promises=plan.promises)


def settled(before: FleetSnapshot, seconds: float) -> FleetSnapshot:
    """The snapshot so much later: what stops has gone, what starts is ready, what runs has come further."""
    replace = msgspec.structs.replace
    now = before.now + seconds
    replicas = [
        replace(each, phase=Phase.READY, since=now)
        if each.phase in (Phase.STARTING, Phase.WARMING)
        else replace(each, phase=Phase.ASLEEP, dozing=False, batch_only=False, since=now)
        if each.dozing
        else each
        for each in before.replicas
        if each.phase is not Phase.DRAINING or each.dozing
    ]
    jobs = []
    for each in before.jobs:
        if each.phase is JobPhase.STOPPING:
            jobs.append(replace(each, phase=JobPhase.QUEUED, on=()))
        elif each.phase is JobPhase.RUNNING and each.remaining_s is not None:
            left = each.remaining_s - seconds * len(each.on) / max(each.devices, 1)
            if left > 0:
                jobs.append(replace(each, remaining_s=left))
        else:
            jobs.append(each)
    return replace(before, now=now, replicas=tuple(replicas), jobs=tuple(jobs))


def actions(plan: Plan) -> list[object]:
    return [
        *plan.start_replicas,
        *plan.stop_replicas,
        *plan.start_jobs,
        *plan.preempt_jobs,
        *plan.lend_replicas,
        *plan.reserve,
    ]


def check(before: FleetSnapshot, plan: Plan) -> None:
    """What must hold of every plan."""
    views = {view.id: view for view in before.devices}
    size = Counter((view.kind, view.node) for view in before.devices if view.up)
    largest = {kind: max(count for (each, _), count in size.items() if each == kind) for kind, _ in size}
    awake = [each for each in before.replicas if each.phase not in (Phase.GONE, Phase.ASLEEP)]
    held = {device for each in awake for device in each.devices}
    held |= {device for each in before.jobs for device in each.on}
    models = {each.name: each for each in before.models}
    jobs = {each.id: each for each in before.jobs}
    reservations = {each.id: each for each in before.reservations}

    given = [device for start in plan.start_replicas for device in start.devices]
    given += [device for start in plan.start_jobs for device in start.devices]
    assert len(set(given)) == len(given), "a device was given out twice"
    assert not held & set(given), "a device was given out that somebody holds"
    assert all(views[device].up for device in given), "a device was given out that is lost"
    kept = [promise.device for promise in plan.promises]
    assert len(set(kept)) == len(kept) and not set(kept) & set(given), "a device is promised twice, or given out too"

    def lent(device: str, preemptible: bool) -> bool:
        owner = reservations.get(views[device].reserved_by or "")
        return owner is None or not owner.start <= before.now < owner.end or (owner.lend and preemptible)

    sleepers = {each.id: each for each in before.replicas if each.phase is Phase.ASLEEP}
    woken = [start.wake for start in plan.start_replicas if start.wake is not None]
    assert len(set(woken)) == len(woken)
    asleep = Counter(each.model for each in sleepers.values())
    asleep.subtract(sleepers[name].model for name in woken)
    for stop in plan.stop_replicas:
        found = next(each for each in before.replicas if each.id == stop.replica)
        asleep[found.model] += 1 if stop.sleep else -1 if found.phase is Phase.ASLEEP else 0
    assert all(asleep[name] <= each.sleepers for name, each in models.items()), "more sleep than may"
    for start in plan.start_replicas:
        view = models[start.model]
        assert start.wake is None or set(sleepers[start.wake].devices) == set(start.devices)
        assert len(start.devices) == view.devices
        kinds = {views[device].kind for device in start.devices}
        nodes = {views[device].node for device in start.devices}
        assert len(kinds) == 1 and (not view.kinds or kinds <= set(view.kinds))
        assert len(nodes) == 1 or view.devices > largest[kinds.pop()]
        assert all(lent(device, start.batch_only) for device in start.devices)
    for begin in plan.start_jobs:
        one = jobs[begin.job]
        assert one.phase is JobPhase.QUEUED and one.not_before <= before.now
        assert len(begin.devices) == one.devices if one.gang else 1 <= len(begin.devices) <= one.devices
        kinds = {views[device].kind for device in begin.devices}
        assert len(kinds) == 1 and (not one.kinds or kinds <= set(one.kinds))
        if one.reservation not in reservations:
            assert all(lent(device, one.preemptible) for device in begin.devices)

    promised = {promise.device: promise.work for promise in plan.promises}
    for_each = Counter(promised.values())
    for gone in plan.preempt_jobs:
        one = jobs[gone.job]
        assert one.phase is JobPhase.RUNNING and one.preemptible
        if not all(views[device].up for device in one.on):
            continue
        if any(not lent(device, True) for device in one.on):
            continue  # its tenant wants it back, used or not
        works = {promised[device] for device in one.on if device in promised}
        assert works, "a job was preempted for nobody"
        complete = False
        for work in works:
            kind, _, name = work.partition(" ")
            if kind == "job":
                complete |= for_each[work] == jobs[name].devices or not jobs[name].gang
            elif kind == "model":
                complete |= for_each[work] % models[name].devices == 0
            else:
                complete = True
        assert complete, "a job was preempted for work that does not get all that it needs"
    assert len({each.job for each in plan.preempt_jobs}) == len(plan.preempt_jobs)
    assert len({each.replica for each in plan.stop_replicas}) == len(plan.stop_replicas)
    assert not {each.replica for each in plan.stop_replicas} & {each.replica for each in plan.lend_replicas}

    queues = {each.name: each for each in before.queues}
    used: Counter[str] = Counter()
    going = {each.job for each in plan.preempt_jobs}  # while they checkpoint, others of their queue may begin
    for each in before.jobs:
        if each.phase is JobPhase.RUNNING and each.reservation not in reservations and each.id not in going:
            used[each.queue] += len(each.on)
    for begin in plan.start_jobs:
        one = jobs[begin.job]
        if one.reservation in reservations:
            continue
        used[one.queue] += len(begin.devices)
    for begin in plan.start_jobs:
        queue = queues.get(jobs[begin.job].queue)
        if queue is not None and queue.borrow is not None and jobs[begin.job].reservation not in reservations:
            assert used[queue.name] <= queue.quota + queue.borrow

    assert [note.device for note in plan.devices] == [view.id for view in before.devices]
    begun = {each.job for each in plan.start_jobs}
    waits = {note.work for note in plan.waiting}
    for each in before.jobs:
        if each.phase is JobPhase.QUEUED:
            assert (each.id in begun) != (f"job {each.id}" in waits), (
                "a job neither begins nor is told what it waits for"
            )


@st.composite
def fleets(draw: st.DrawFn, kinds: Sequence[str] = ("h100",), reserve: bool = True) -> FleetSnapshot:
    """Fleets of up to 5 nodes with work of all sorts on some of their devices, and more that waits."""
    views: list[DeviceView] = []
    for number in range(draw(st.integers(1, 5))):
        views += devices(draw(st.sampled_from([1, 2, 4])), kind=draw(st.sampled_from(list(kinds))), first=number)
    down = draw(st.sets(st.integers(0, len(views) - 1), max_size=1))
    reservations = []
    if reserve and draw(st.booleans()):
        begins = draw(st.sampled_from([-100.0, 20.0, 500.0]))
        reservations.append(
            ReservationView(
                id="r1",
                tenant="acme",
                devices=draw(st.integers(1, 3)),
                start=NOW + begins,
                end=NOW + 5000,
                lend=draw(st.booleans()),
            )
        )
        if begins < 0:
            for index in draw(st.sets(st.integers(0, len(views) - 1), max_size=reservations[0].devices)):
                views[index] = msgspec.structs.replace(views[index], reserved_by="r1")
    views = [msgspec.structs.replace(view, up=index not in down) for index, view in enumerate(views)]
    models = [
        model(
            name,
            draw(st.sampled_from([0.0, 400.0, 900.0, 2500.0])),
            devices=draw(st.sampled_from([1, 1, 2])),
            kinds=tuple(draw(st.permutations(list(kinds)))[: draw(st.integers(0, len(kinds)))]),
            min_replicas=draw(st.integers(0, 2)),
            waiting=draw(st.sampled_from([0, 0, 3])),
            idle_s=draw(st.sampled_from([0.0, 1000.0])),
            priority=draw(st.integers(0, 1)),
            peak=draw(st.sampled_from([None, 0.0, 3000.0])),
            sleepers=draw(st.sampled_from([0, 0, 1, 2])),
        )
        for name in draw(st.sampled_from([(), ("chat",), ("chat", "code")]))
    ]
    queues = [
        QueueView(name=name, quota=draw(st.integers(0, 4)), borrow=draw(st.sampled_from([None, 0, 2])))
        for name in ("research", "product")
    ]
    free = [view.id for view in views if view.up]
    replicas: list[ReplicaView] = []
    jobs: list[JobView] = []
    for number in range(draw(st.integers(0, 6))):
        node = views[draw(st.integers(0, len(views) - 1))].node
        here = [device for device in free if device.startswith(f"{node}/")]
        if len(models) > 0 and draw(st.booleans()):
            of = draw(st.sampled_from(models))
            own = next(view.kind for view in views if view.node == node)
            if len(here) >= of.devices and (not of.kinds or own in of.kinds):
                on = tuple(here[: of.devices])
                lives = [Phase.READY, Phase.READY, Phase.STARTING, Phase.DRAINING, Phase.ASLEEP]
                phase = draw(st.sampled_from(lives))
                replicas.append(
                    replica(
                        f"{of.name}-{number}",
                        of.name,
                        *on,
                        phase=phase,
                        batch_only=phase is not Phase.ASLEEP and draw(st.booleans()),
                        filler=0 if phase is Phase.ASLEEP else draw(st.integers(0, 2)),
                        since=NOW - draw(st.sampled_from([10.0, 1000.0])),
                    )
                )
                if phase is not Phase.ASLEEP:
                    free = [device for device in free if device not in on]
        elif here:
            on = tuple(here[: draw(st.integers(1, 4))])
            jobs.append(_drawn_job(draw, f"run{number}", len(on), on, kinds))
            free = [device for device in free if device not in on]
    for number in range(draw(st.integers(0, 5))):
        jobs.append(_drawn_job(draw, f"wait{number}", draw(st.integers(1, 6)), (), kinds))
    if len(reservations) > 0 and draw(st.booleans()):
        most = min(2, reservations[0].devices)  # more is refused when it is submitted
        jobs.append(job("mine", draw(st.integers(1, most)), reservation="r1", queue="research"))
    backlogs = [
        BacklogView(
            model=each.name,
            parts=((draw(st.sampled_from([0.0, 1e5, 1e7])), NOW + draw(st.sampled_from([600.0, 80000.0]))),),
        )
        for each in models
        if draw(st.booleans())
    ]
    return snapshot(
        views,
        models=models,
        replicas=replicas,
        jobs=jobs,
        queues=queues,
        reservations=reservations,
        backlogs=backlogs,
    )


def _drawn_job(draw: st.DrawFn, name: str, count: int, on: Sequence[str], kinds: Sequence[str]) -> JobView:
    return job(
        name,
        count,
        on,
        queue=draw(st.sampled_from(["research", "product", "nobody's"])),
        gang=draw(st.sampled_from([True, True, False])),
        preemptible=draw(st.sampled_from([True, True, True, False])),
        priority=draw(st.integers(0, 2)),
        deadline=draw(st.sampled_from([None, None, NOW + 900, NOW + 50000])),
        remaining_s=draw(st.sampled_from([None, 5.0 if on else 30.0, 600.0, 20000.0])),
        grace_s=draw(st.sampled_from([5.0, 60.0])),
        submitted_at=NOW - draw(st.integers(0, 20)) * 500,
        unsaved_s=float(draw(st.integers(0, 3)) * 100),
        phase=draw(st.sampled_from([JobPhase.RUNNING] * 4 + [JobPhase.STOPPING])) if on else JobPhase.QUEUED,
        started_at=NOW - draw(st.sampled_from([10, 1000])) if on else 0.0,
    )
