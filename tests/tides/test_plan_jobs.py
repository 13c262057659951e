"""Jobs: quotas, borrowing, gangs, deadlines, and that everybody's turn comes."""

from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.tides.fleets import NOW, carried_out, check, devices, job, model, replica, settled, snapshot
from tidemill.tides.plan import plan
from tidemill.tides.quota import is_urgent
from tidemill.tides.rules import RULES
from tidemill.tides.state import BacklogView, FleetSnapshot, JobPhase, JobView, Plan, QueueView

EIGHT = devices(4, 4)
IDS = [view.id for view in EIGHT]


def started(decided: Plan) -> list[str]:
    return [each.job for each in decided.start_jobs]


def preempted(decided: Plan) -> list[str]:
    return sorted(each.job for each in decided.preempt_jobs)


def why(decided: Plan, name: str) -> str:
    return next(note.why for note in decided.waiting if note.work == f"job {name}")


def run_through(now: FleetSnapshot, seconds: float = 60, times: int = 100) -> tuple[FleetSnapshot, set[str]]:
    """Carry plans out until all jobs have ended, or so many times. Returns the jobs that ever ran, too."""
    ran: set[str] = set()
    for _ in range(times):
        decided = plan(now)
        check(now, decided)
        ran |= set(started(decided))
        now = settled(carried_out(now, decided), seconds)
        if not now.jobs:
            break
    return now, ran


def test_first_come_first_served_where_nothing_else_is_said() -> None:
    jobs = [job(name, 3, submitted_at=NOW - age) for name, age in (("young", 10), ("old", 30), ("middle", 20))]
    decided = plan(snapshot(EIGHT, jobs=jobs))
    assert started(decided) == ["old", "middle"]
    assert why(decided, "young").startswith("3 devices at once (any kind)")


def test_a_level_of_priority_is_worth_an_hour_of_waiting() -> None:
    jobs = [job("old", 8, submitted_at=NOW - 7300), job("important", 8, submitted_at=NOW - 3500, priority=1)]
    assert started(plan(snapshot(EIGHT, jobs=jobs))) == ["old"]
    jobs[0] = msgspec.structs.replace(jobs[0], submitted_at=NOW - 7000)
    assert started(plan(snapshot(EIGHT, jobs=jobs))) == ["important"]


def test_a_gang_gets_all_of_its_devices_or_none_and_the_elastic_take_what_there_is() -> None:
    busy = job("busy", 3, IDS[:3], preemptible=False)
    decided = plan(snapshot(EIGHT, jobs=[busy, job("gang", 6)]))
    assert not decided.start_jobs and "5 are kept for it" in why(decided, "gang")
    decided = plan(snapshot(EIGHT, jobs=[busy, job("elastic", 6, gang=False)]))
    assert len(decided.start_jobs[0].devices) == 5


def test_a_job_that_is_too_large_for_the_fleet_is_told_so_and_holds_nobody_up() -> None:
    jobs = [job("huge", 9), job("h20", 1, kinds=("h20",)), job("small", 1, submitted_at=NOW)]
    decided = plan(snapshot(EIGHT, jobs=jobs))
    assert started(decided) == ["small"]
    assert "the fleet has 8" in why(decided, "huge") and "h20" in why(decided, "h20")


def test_a_retry_waits() -> None:
    assert "in 20 s" in why(plan(snapshot(EIGHT, jobs=[job("again", not_before=NOW + 20)])), "again")


def test_a_queue_gets_its_quota_back_from_those_that_borrow() -> None:
    queues = [QueueView(name="owner", quota=4), QueueView(name="guest", quota=2)]
    young = NOW - 10  # a borrower is protected from equals only
    running = [
        job(f"g{index}", 2, IDS[2 * index : 2 * index + 2], queue="guest", started_at=young, unsaved_s=100.0 * index)
        for index in range(4)
    ]
    decided = plan(snapshot(EIGHT, queues=queues, jobs=[*running, job("mine", 4, queue="owner")]))
    assert preempted(decided) == ["g0", "g1"]
    assert sorted(each.device for each in decided.promises) == sorted(IDS[:4])
    more = [*running, job("mine", 4, queue="owner"), job("more", 2, queue="owner")]
    decided = plan(snapshot(EIGHT, queues=queues, jobs=more))
    assert preempted(decided) == ["g0", "g1"], "beyond its quota it is one who borrows, too"


def test_a_queue_within_its_quota_is_left_alone() -> None:
    queues = [QueueView(name="owner", quota=4), QueueView(name="guest", quota=4)]
    running = [job(name, 4, IDS[4 * index : 4 * index + 4], queue="guest") for index, name in enumerate(("a", "b"))]
    one = plan(snapshot(EIGHT, queues=queues, jobs=[*running, job("mine", 4, queue="owner")]))
    assert len(one.preempt_jobs) == 1
    kept = [job("a", 4, IDS[:4], queue="guest"), job("o", 4, IDS[4:], queue="owner")]
    late = job("mine", 2, queue="owner", submitted_at=NOW)
    assert not plan(snapshot(EIGHT, queues=queues, jobs=[*kept, late])).preempt_jobs


def test_borrowing_ends_at_the_limit() -> None:
    queues = [QueueView(name="guest", quota=1, borrow=2)]
    decided = plan(snapshot(EIGHT, queues=queues, jobs=[job(str(index), 1, queue="guest") for index in range(5)]))
    assert len(decided.start_jobs) == 3 and "may have 3" in why(decided, "4")


def test_what_is_borrowed_is_shared_by_weight() -> None:
    queues = [QueueView(name="light", weight=1), QueueView(name="heavy", weight=3)]
    jobs = [job(f"{name}{index}", 1, queue=name) for name in ("light", "heavy") for index in range(8)]
    decided = plan(snapshot(EIGHT, queues=queues, jobs=jobs))
    assert sum(name.startswith("heavy") for name in started(decided)) == 6
    running = [job(f"r{index}", 1, [device], queue="light") for index, device in enumerate(IDS)]
    late = [each for each in jobs if each.queue == "heavy"]
    decided = plan(snapshot(EIGHT, queues=queues, jobs=[*running, *late]))
    assert len(decided.preempt_jobs) == 6
    after, _ = run_through(snapshot(EIGHT, queues=queues, jobs=[*running, *late]), seconds=1000, times=12)
    held = [sum(len(each.on) for each in after.jobs if each.queue == name) for name in ("light", "heavy")]
    assert held == [2, 6]


def test_what_cannot_be_preempted_leaves_room_for_what_is_guaranteed() -> None:
    jobs = [job("firm", 6, preemptible=False)]
    assert not plan(snapshot(EIGHT, models=[model(min_replicas=3)], jobs=jobs)).start_jobs
    assert "can't be preempted" in why(plan(snapshot(EIGHT, models=[model(min_replicas=3)], jobs=jobs)), "firm")
    queues = [QueueView(name="default", quota=0), QueueView(name="owner", quota=4)]
    assert not plan(snapshot(EIGHT, queues=queues, jobs=jobs)).start_jobs
    assert started(plan(snapshot(EIGHT, queues=[QueueView(name="default", quota=6)], jobs=jobs))) == ["firm"]


def test_an_urgent_job_goes_first_and_one_whose_deadline_is_lost_does_not() -> None:
    old = job("old", 8, submitted_at=NOW - 20_000, remaining_s=1000.0)
    due = job("due", 8, submitted_at=NOW, remaining_s=1000.0, deadline=NOW + 1100)
    assert started(plan(snapshot(EIGHT, jobs=[old, due]))) == ["due"]
    for deadline in (NOW + 20_000, NOW + 300):
        other = msgspec.structs.replace(due, deadline=deadline)
        assert started(plan(snapshot(EIGHT, jobs=[old, other]))) == ["old"]
    running = job("runs", 8, IDS, remaining_s=50_000.0)
    assert preempted(plan(snapshot(EIGHT, jobs=[running, due]))) == ["runs"]
    young = job("runs", 8, IDS, remaining_s=50_000.0, started_at=NOW - 10)
    assert preempted(plan(snapshot(EIGHT, jobs=[young, due]))) == []


def test_equals_do_not_take_from_each_other_before_a_while() -> None:
    for age, gone in ((10.0, []), (5000.0, ["low"])):
        low = job("low", 8, IDS, started_at=NOW - age, priority=0)
        high = job("high", 8, priority=3)
        assert preempted(plan(snapshot(EIGHT, jobs=[low, high]))) == gone


def test_small_jobs_pass_a_gang_that_waits_only_if_they_do_not_hold_it_up() -> None:
    busy = job("busy", 4, IDS[:4], preemptible=False, remaining_s=2000.0)
    gang = job("gang", 8, submitted_at=NOW - 9000)
    short = job("short", 1, submitted_at=NOW, remaining_s=900.0, preemptible=False)
    long = job("long", 1, submitted_at=NOW, remaining_s=3000.0, preemptible=False)
    gives = job("gives", 1, submitted_at=NOW, remaining_s=90_000.0)
    decided = plan(snapshot(EIGHT, jobs=[busy, gang, short, long, gives]))
    assert sorted(started(decided)) == ["gives", "short"]
    assert "expected in 2000 s" in why(decided, "gang") and "job gang with 8 devices is first" in why(decided, "long")


def test_batches_use_what_is_kept_for_a_gang_and_give_it_back_to_it() -> None:
    busy = job("busy", 4, IDS[:4], preemptible=False, remaining_s=5000.0)
    lines = BacklogView(model="qwen", parts=((1e8, NOW + 1e6),))
    off = model(min_replicas=0, idle_s=1e6)
    before = snapshot(EIGHT, models=[off], jobs=[busy, job("gang", 8)], backlogs=[lines])
    decided = plan(before)
    assert len(decided.start_replicas) == 4 and all(each.batch_only for each in decided.start_replicas)
    free = msgspec.structs.replace(
        before,
        jobs=(before.jobs[1],),
        replicas=tuple(
            replica(f"b{index}", "qwen", IDS[4 + index], batch_only=True, since=NOW - 1000) for index in range(4)
        ),
    )
    decided = plan(free)
    assert len(decided.stop_replicas) == 4 and len(decided.promises) == 8


def test_a_gang_of_the_whole_fleet_comes_to_its_turn_in_a_stream_of_small_jobs() -> None:
    """Each minute another small job comes, of a queue of its own that has borrowed nothing."""
    small = [
        job(f"s{index}", 1, queue=f"q{index % 3}", remaining_s=600.0, submitted_at=NOW + 60 * index, preemptible=False)
        for index in range(120)
    ]
    now = snapshot(EIGHT, jobs=[job("gang", 8, remaining_s=600.0, submitted_at=NOW + 300)])
    left = list(small)
    for minute in range(240):
        while left and left[0].submitted_at <= NOW + 60 * minute:
            now = msgspec.structs.replace(now, jobs=(*now.jobs, left.pop(0)))
        decided = plan(now)
        check(now, decided)
        now = settled(carried_out(now, decided), 60)
        if not any(each.id == "gang" for each in now.jobs):
            break
    assert minute < 60
    assert not any(each.id == "gang" for each in now.jobs)


@st.composite
def lines_of_jobs(draw: st.DrawFn) -> Sequence[JobView]:
    return [
        job(
            f"j{index}",
            draw(st.integers(1, 8)),
            queue=draw(st.sampled_from(["a", "b", "c"])),
            gang=draw(st.booleans()),
            preemptible=draw(st.booleans()),
            priority=draw(st.integers(0, 3)),
            remaining_s=float(draw(st.integers(1, 60)) * 60),
            submitted_at=NOW - draw(st.integers(0, 600)),
            deadline=draw(st.sampled_from([None, None, NOW + 3000])),
        )
        for index in range(draw(st.integers(1, 10)))
    ]


@given(lines_of_jobs(), st.integers(0, 6), st.integers(0, 6))
@examples(0.6)
def test_every_job_ends(jobs: Sequence[JobView], quota: int, other: int) -> None:
    """Whatever the queues: jobs that fit into the fleet are all done in the end, and the fleet is never left idle."""
    queues = [QueueView(name="a", quota=quota), QueueView(name="b", quota=other)]
    firm_room = len(EIGHT) - quota - other
    jobs = [
        msgspec.structs.replace(each, preemptible=True)
        if each.devices > max(firm_room, {"a": quota, "b": other}.get(each.queue, 0))
        else each
        for each in jobs
    ]
    left, _ = run_through(snapshot(EIGHT, queues=queues, jobs=jobs), seconds=300, times=400)
    assert left.jobs == ()


@given(lines_of_jobs())
@examples(0.6)
def test_no_device_is_left_free_that_a_waiting_job_could_have(jobs: Sequence[JobView]) -> None:
    """Free devices are fewer than what any job that waits needs, or they are kept for one."""
    jobs = [msgspec.structs.replace(each, preemptible=True) for each in jobs]
    decided = plan(snapshot(EIGHT, jobs=jobs))
    free = len(EIGHT) - sum(len(each.devices) for each in decided.start_jobs) - len(decided.promises)
    begun = set(started(decided))
    waiting = [each for each in jobs if each.id not in begun and each.phase is JobPhase.QUEUED]
    assert all((each.devices if each.gang else 1) > free for each in waiting)


def test_an_urgent_job_stays_urgent_until_it_has_ended() -> None:
    """Else the job would be preempted as soon as it has run for a while, until it is urgent again."""
    waits = job("due", 1, submitted_at=NOW - 9000, remaining_s=20_000.0, deadline=NOW + 24_000.0)
    assert is_urgent(waits, NOW, RULES)
    for ran in (0.0, 7_000.0, 19_000.0):
        runs = msgspec.structs.replace(
            waits, phase=JobPhase.RUNNING, on=(IDS[0],), started_at=NOW, remaining_s=20_000.0 - ran
        )
        assert is_urgent(runs, NOW + ran, RULES)
    idle = msgspec.structs.replace(waits, remaining_s=5_000.0)
    assert not is_urgent(idle, NOW, RULES), "it can wait long"


def test_a_quota_waits_for_a_deadline_that_is_nearly_kept() -> None:
    own = QueueView(name="own", quota=8)
    mine = job("mine", 8, queue="own")

    def to_go(left: float, deadline: float | None, for_deadline: float | None = None) -> list[str]:
        lent = job("lent", 8, IDS, queue="other", remaining_s=left, deadline=deadline)
        waits = msgspec.structs.replace(mine, deadline=for_deadline, remaining_s=4000.0)
        return preempted(plan(snapshot(EIGHT, jobs=[lent, waits], queues=[own])))

    assert to_go(900.0, NOW + 1000.0) == []
    assert to_go(900.0, None) == ["lent"]
    assert to_go(9000.0, NOW + 10_000.0) == ["lent"], "not for hours"
    assert to_go(900.0, NOW + 1000.0, for_deadline=NOW + 5000.0) == ["lent"], "two that press"
