"""Reservations: guaranteed, and lent only with consent."""

import msgspec
from hypothesis import given

from tests.tides.fleets import NOW, actions, carried_out, devices, fleets, job, model, replica, settled, snapshot
from tidemill.tides.plan import plan
from tidemill.tides.state import BacklogView, FleetSnapshot, JobPhase, ReservationView

FOUR = devices(4)
IDS = [view.id for view in FOUR]


def rented(start: float = -10.0, count: int = 2, lend: bool = False) -> ReservationView:
    return ReservationView(id="r1", tenant="acme", devices=count, start=NOW + start, end=NOW + 50_000, lend=lend)


def test_devices_are_called_back_in_time_for_its_start_and_not_before() -> None:
    jobs = [job(f"j{index}", 1, [device], grace_s=60.0) for index, device in enumerate(IDS)]
    assert not plan(snapshot(FOUR, jobs=jobs, reservations=[rented(1000.0)])).preempt_jobs
    decided = plan(snapshot(FOUR, jobs=jobs, reservations=[rented(70.0)]))
    assert len(decided.preempt_jobs) == 2
    assert [each.work for each in decided.promises] == ["reservation r1"] * 2
    assert "begins in 70 s" in decided.preempt_jobs[0].why


def test_what_is_free_is_kept_for_it_shortly_before() -> None:
    waiting = job("waits", 4)
    assert plan(snapshot(FOUR, jobs=[waiting], reservations=[rented(5000.0)])).start_jobs
    decided = plan(snapshot(FOUR, jobs=[waiting], reservations=[rented(100.0)]))
    assert not decided.start_jobs and not decided.reserve


def test_its_devices_are_marked_when_it_begins_and_stand_idle_unless_lent() -> None:
    waiting = [job("one", 3), job("firm", 3, preemptible=False)]
    before = snapshot(FOUR, jobs=waiting, reservations=[rented()])
    decided = plan(before)
    assert [len(each.devices) for each in decided.reserve] == [2] and not decided.start_jobs
    assert not actions(plan(carried_out(before, decided)))
    lent = msgspec.structs.replace(before, reservations=(rented(lend=True),))
    decided = plan(carried_out(lent, plan(lent)))
    assert [each.job for each in decided.start_jobs] == ["one"], "to what can be preempted only"


def test_its_own_jobs_get_back_what_was_lent() -> None:
    marked = [msgspec.structs.replace(view, reserved_by="r1" if index < 2 else None) for index, view in enumerate(FOUR)]
    guest = job("guest", 4, IDS, unsaved_s=500.0, started_at=NOW - 5)
    mine = job("mine", 2, reservation="r1")
    before = snapshot(marked, jobs=[guest, mine], reservations=[rented(lend=True)])
    decided = plan(before)
    assert [each.job for each in decided.preempt_jobs] == ["guest"]
    after = settled(carried_out(before, decided), 60)
    assert ("mine", tuple(IDS[:2])) in [(each.job, each.devices) for each in plan(after).start_jobs]


def test_who_does_not_lend_has_others_cleared_out() -> None:
    marked = [msgspec.structs.replace(FOUR[0], reserved_by="r1"), *FOUR[1:]]
    guests = [job("guest", 1, IDS[:1])]
    decided = plan(snapshot(marked, jobs=guests, reservations=[rented(count=1)]))
    assert [each.job for each in decided.preempt_jobs] == ["guest"]
    assert not plan(snapshot(marked, jobs=guests, reservations=[rented(count=1, lend=True)])).preempt_jobs


def test_interactive_replicas_are_not_put_on_lent_devices_and_batches_are() -> None:
    marked = [msgspec.structs.replace(view, reserved_by="r1") for view in FOUR]
    lines = BacklogView(model="qwen", parts=((1e8, NOW + 1e6),))
    before = snapshot(marked, models=[model(work=2000.0)], backlogs=[lines], reservations=[rented(count=4, lend=True)])
    assert all(each.batch_only for each in plan(before).start_replicas) and plan(before).start_replicas
    unwilling = msgspec.structs.replace(before, reservations=(rented(count=4),))
    assert not plan(unwilling).start_replicas


def test_its_jobs_run_beyond_quotas_and_are_never_preempted() -> None:
    mine = job("mine", 2, IDS[:2], reservation="r1")
    decided = plan(snapshot(FOUR, models=[model(work=1e6)], jobs=[mine], reservations=[rented()]))
    assert not decided.preempt_jobs and len(decided.start_replicas) == 2


def test_replicas_beyond_the_minimum_make_room_for_it() -> None:
    here = [replica(str(index), "qwen", device) for index, device in enumerate(IDS)]
    busy = model(work=3000.0)
    decided = plan(snapshot(FOUR, models=[busy], replicas=here, reservations=[rented(count=3)]))
    assert len(decided.stop_replicas) == 3
    firm = model(work=3000.0, min_replicas=3)
    decided = plan(snapshot(FOUR, models=[firm], replicas=here, reservations=[rented(count=3)]))
    assert len(decided.stop_replicas) == 1
    assert any(note.work == "reservation r1" and "2 of its 3" in note.why for note in decided.waiting)


def test_a_device_that_is_lost_is_replaced_and_the_spare_one_handed_back_later() -> None:
    lost = [
        msgspec.structs.replace(FOUR[0], reserved_by="r1", up=False),
        msgspec.structs.replace(FOUR[1], reserved_by="r1"),
        *FOUR[2:],
    ]
    before = snapshot(lost, reservations=[rented()])
    decided = plan(before)
    assert len(decided.reserve[0].devices) == 2 and IDS[0] not in decided.reserve[0].devices
    after = carried_out(before, decided)
    views = tuple(
        msgspec.structs.replace(view, up=True, reserved_by=view.reserved_by or None) for view in after.devices
    )
    assert not plan(msgspec.structs.replace(after, devices=views)).reserve


@given(fleets())
def test_a_reservation_has_its_devices_after_the_longest_grace_time(before: FleetSnapshot) -> None:
    """As far as there are devices that may be taken: not those of what can't be preempted, nor minimum replicas."""
    now = before
    for _ in range(4):
        now = settled(carried_out(now, plan(now)), 60)
    for each in now.reservations:
        if not each.start <= now.now < each.end:
            continue
        mine = [view for view in now.devices if view.reserved_by == each.id and view.up]
        firm = {d for one in now.jobs if not one.preemptible and one.reservation != each.id for d in one.on}
        firm |= {d for one in now.jobs if one.phase is JobPhase.STOPPING for d in one.on}
        minimum = sum(one.min_replicas * one.devices for one in now.models)
        up = sum(1 for view in now.devices if view.up and view.id not in firm)
        assert len(mine) >= min(each.devices, up - minimum - 2)
        if not each.lend:
            others = {d for one in now.jobs if one.reservation != each.id and one.preemptible for d in one.on}
            assert not others & {view.id for view in mine}
