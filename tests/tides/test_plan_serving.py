"""Replicas for people come first."""

from collections import Counter
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.tides.fleets import NOW, carried_out, devices, fleets, job, model, replica, settled, snapshot
from tidemill.tides.plan import plan
from tidemill.tides.rules import Rules
from tidemill.tides.state import BacklogView, Demand, DeviceView, FleetSnapshot, JobPhase, ModelView, Phase, ReplicaView

FOUR = devices(4)
IDS = [view.id for view in FOUR]
LINES = BacklogView(model="qwen", parts=((1e7, NOW + 80_000),))


def replicas(*names: str, model: str = "qwen", since: float = NOW - 1000, **more: Any) -> list[ReplicaView]:
    return [replica(name, model, IDS[index], since=since, **more) for index, name in enumerate(names)]


def test_replicas_for_what_is_expected_at_its_high() -> None:
    chat = model(demand=Demand(1000.0, 2000.0))  # at three quarters of 1,000 a replica: 3
    decided = plan(snapshot(FOUR, models=[chat]))
    assert len(decided.start_replicas) == 3
    assert "2,000 tokens/s" in decided.start_replicas[0].why
    here = [replica("a", "qwen", IDS[0]), replica("b", "qwen", IDS[1], phase=Phase.STARTING)]
    assert len(plan(snapshot(FOUR, models=[chat], replicas=here)).start_replicas) == 1, "one that starts counts"


def test_between_minimum_and_maximum() -> None:
    assert len(plan(snapshot(FOUR, models=[model(min_replicas=2)])).start_replicas) == 2
    assert len(plan(snapshot(FOUR, models=[model(work=1e6, max_replicas=3)])).start_replicas) == 3


def test_requests_that_wait_ask_for_replicas_once_the_last_one_has_had_time() -> None:
    chat = model(waiting=10, slots=4)
    assert len(plan(snapshot(FOUR, models=[chat], replicas=replicas("a"))).start_replicas) == 3
    assert not plan(snapshot(FOUR, models=[chat], replicas=replicas("a", since=NOW - 1))).start_replicas


def test_missed_objectives_ask_for_one_more_where_replicas_are_busy() -> None:
    late = model(work=700.0, now=700.0, late=0.1)
    assert len(plan(snapshot(FOUR, models=[late], replicas=replicas("a"))).start_replicas) == 1
    idle = msgspec.structs.replace(late, now=10.0)
    assert not plan(snapshot(FOUR, models=[idle], replicas=replicas("a"))).start_replicas
    assert not plan(snapshot(FOUR, models=[late], replicas=replicas("a", since=NOW - 30))).start_replicas


def test_a_model_at_zero_wakes_for_the_first_request_and_sleeps_after_it_was_idle() -> None:
    off = model(min_replicas=0, idle_s=1e6)
    assert not plan(snapshot(FOUR, models=[off])).start_replicas
    assert len(plan(snapshot(FOUR, models=[msgspec.structs.replace(off, waiting=1)])).start_replicas) == 1
    soon = msgspec.structs.replace(off, demand=Demand(200.0, 200.0))
    assert len(plan(snapshot(FOUR, models=[soon])).start_replicas) == 1, "before the tide comes"
    here = replicas("a")
    assert plan(snapshot(FOUR, models=[off], replicas=here)).stop_replicas
    just = msgspec.structs.replace(off, idle_s=100.0)
    assert not plan(snapshot(FOUR, models=[just], replicas=here)).stop_replicas


def test_replicas_are_given_up_late() -> None:
    less = model(work=500.0)  # one is enough
    assert not plan(snapshot(FOUR, models=[less], replicas=replicas("a", "b", since=NOW - 100))).stop_replicas
    assert len(plan(snapshot(FOUR, models=[less], replicas=replicas("a", "b"))).stop_replicas) == 1
    was = msgspec.structs.replace(less, peak=2000.0)
    assert not plan(snapshot(FOUR, models=[was], replicas=replicas("a", "b"))).stop_replicas
    over = msgspec.structs.replace(less, peak=500.0)
    many = replicas("a", "b", "c", "d", since=NOW - 100)
    assert len(plan(snapshot(FOUR, models=[over], replicas=many)).stop_replicas) == 3, "many at once, by their peak"
    late = msgspec.structs.replace(over, late=0.04)
    assert not plan(snapshot(FOUR, models=[late], replicas=many)).stop_replicas


def test_a_replica_is_lent_to_batches_rather_than_stopped_and_taken_back_at_once() -> None:
    less = model(work=500.0, peak=500.0)
    decided = plan(snapshot(FOUR, models=[less], replicas=replicas("a", "b"), backlogs=[LINES]))
    assert [lent.batch_only for lent in decided.lend_replicas] == [True] and not decided.stop_replicas
    lent = [*replicas("a"), replica("b", "qwen", IDS[1], batch_only=True, filler=3)]
    more = snapshot(FOUR[:2], models=[model(work=1400.0)], replicas=lent, backlogs=[LINES])
    decided = plan(more)
    assert [(lent.replica, lent.batch_only) for lent in decided.lend_replicas] == [("b", False)]
    stopped = plan(more, Rules(lend_replicas=False))
    assert [stop.replica for stop in stopped.stop_replicas] == ["b"]


def test_a_job_gives_way_the_one_that_loses_least() -> None:
    jobs = [
        job("cheap", 1, IDS[:1], unsaved_s=10.0),
        job("dear", 1, IDS[1:2], unsaved_s=900.0),
        job("firm", 1, IDS[2:3], preemptible=False),
        job("due", 1, IDS[3:4], deadline=NOW + 1000, remaining_s=900.0),
    ]
    for count, gone in (
        (1, ["cheap"]),
        (2, ["cheap", "dear"]),
        (3, ["cheap", "dear", "due"]),
        (4, ["cheap", "dear", "due"]),
    ):
        decided = plan(snapshot(FOUR, models=[model(work=740.0 * count)], jobs=jobs))
        assert sorted(each.job for each in decided.preempt_jobs) == gone[:count]
    assert any(note.work == "model qwen" and "1 more" in note.why for note in decided.waiting)


def test_nobody_gives_way_where_a_device_comes_free_anyway() -> None:
    running = job("runs", 1, IDS[:1])
    one = FOUR[:2]
    for other in (
        job("ends", 1, IDS[1:2], remaining_s=5.0),
        job("stops", 1, IDS[1:2], phase=JobPhase.STOPPING),
    ):
        decided = plan(snapshot(one, models=[model(work=100.0)], jobs=[running, other]))
        assert not decided.preempt_jobs and not decided.start_replicas
        assert [(each.device, each.work) for each in decided.promises] == [(IDS[1], "model qwen")]
    drains = replica("old", "other", IDS[1], phase=Phase.DRAINING)
    assert not plan(snapshot(one, models=[model(work=100.0)], jobs=[running], replicas=[drains])).preempt_jobs


def test_exactly_as_many_devices_as_are_needed_rather_than_a_large_gang() -> None:
    jobs = [job("large", 3, IDS[:3]), job("small", 1, IDS[3:])]
    assert [each.job for each in plan(snapshot(FOUR, models=[model(work=100.0)], jobs=jobs)).preempt_jobs] == ["small"]


def test_batches_with_time_give_way_before_jobs() -> None:
    batch = replica("b", "qwen", IDS[0], batch_only=True, filler=9)
    other = model("chat", 100.0)
    decided = plan(
        snapshot(
            FOUR[:2],
            models=[other, model(min_replicas=0, idle_s=1e6)],
            replicas=[batch],
            jobs=[job("runs", 1, IDS[1:2])],
            backlogs=[LINES],
        )
    )
    assert [each.replica for each in decided.stop_replicas] == ["b"] and not decided.preempt_jobs


def test_a_replica_of_several_devices_is_on_one_node_and_of_the_best_kind() -> None:
    fleet = [*devices(3, kind="h20"), *devices(2, 4, first=1)]
    large = model(devices=4, kinds=("h100", "h20"))
    assert plan(snapshot(fleet, models=[large])).start_replicas[0].devices == ("n2/0", "n2/1", "n2/2", "n2/3")
    pair = model(devices=2, kinds=("h20", "h100"))
    assert plan(snapshot(fleet, models=[pair])).start_replicas[0].devices == ("n0/0", "n0/1")
    tight = model(devices=2, kinds=("h100",))
    assert plan(snapshot(fleet, models=[tight])).start_replicas[0].devices == ("n1/0", "n1/1"), "whole nodes stay whole"
    too_large = model(devices=7, kinds=("h100",))
    assert not plan(snapshot(fleet, models=[too_large])).start_replicas


def nodes_of_first(fleet: tuple[DeviceView, ...], wanted: ModelView) -> list[str]:
    decided = plan(snapshot(fleet, models=[wanted]))
    return [device.partition("/")[0] for device in decided.start_replicas[0].devices] if decided.start_replicas else []


def test_a_replica_larger_than_any_node_is_in_equal_parts_on_as_few_as_can_be() -> None:
    large = model(devices=8, spans=True)
    assert nodes_of_first(devices(4, 4, 4), large) == ["n0"] * 4 + ["n1"] * 4
    assert nodes_of_first(devices(3, 4, 4), large) == ["n1"] * 4 + ["n2"] * 4, "not 3 and 5"
    assert nodes_of_first(devices(4, 3, 3), large) == [], "two nodes with 4 are wanted"
    assert nodes_of_first(devices(4, 4), model(devices=6, spans=True)) == ["n0"] * 3 + ["n1"] * 3
    assert nodes_of_first(devices(4, 4, 4), model(devices=8)) == [], "not every engine can"
    assert nodes_of_first(devices(8, 4, 4), large) == ["n0"] * 8, "where one node is large enough, it is on one"


def test_whole_nodes_are_cleared_for_a_replica_that_needs_several() -> None:
    fleet = devices(2, 2, 2)
    jobs = [job("a", 1, ["n0/0"]), job("b", 1, ["n1/1"]), job("c", 2, ["n2/0", "n2/1"])]
    large = model(devices=4, spans=True)
    decided = plan(snapshot(fleet, models=[large], jobs=jobs))
    assert sorted(each.job for each in decided.preempt_jobs) == ["a", "b"], "the two nodes where least is lost"


def test_the_minimum_of_each_model_goes_before_more_of_another() -> None:
    greedy = model("greedy", 10_000.0, priority=5)
    shy = model("shy", min_replicas=1)
    decided = plan(snapshot(FOUR, models=[greedy, shy]))
    assert sorted(each.model for each in decided.start_replicas) == ["greedy"] * 3 + ["shy"]
    here = [replica(f"g{index}", "greedy", each) for index, each in enumerate(IDS)]
    decided = plan(snapshot(FOUR, models=[greedy, shy], replicas=here))
    assert len(decided.stop_replicas) == 1 and decided.promises[0].work == "model shy"


def test_a_replica_on_a_device_that_was_taken_out_serves_until_another_does() -> None:
    out = [msgspec.structs.replace(FOUR[0], up=False), *FOUR[1:]]
    old = replica("old", "qwen", IDS[0])
    first = plan(snapshot(out, models=[model()], replicas=[old]))
    assert first.start_replicas and not first.stop_replicas
    new = replica("new", "qwen", IDS[1])
    assert [each.replica for each in plan(snapshot(out, models=[model()], replicas=[old, new])).stop_replicas] == [
        "old"
    ]


@given(fleets(reserve=False))
@examples(1.5)
def test_no_model_waits_for_a_device_that_a_preemptible_job_holds(before: FleetSnapshot) -> None:
    decided = plan(before)
    refused = {note.work for note in decided.waiting if "nothing that holds such devices" in note.why}
    going = {each.job for each in decided.preempt_jobs}
    up = {view.id for view in before.devices if view.up}
    promised = {each.device for each in decided.promises}
    for one in before.models:
        if f"model {one.name}" in refused and one.devices == 1:
            for each in before.jobs:
                if each.preemptible and each.phase is JobPhase.RUNNING and each.id not in going:
                    soon = each.remaining_s is not None and each.remaining_s <= Rules().soon_s
                    assert soon or not set(each.on) & up, f"{each.id} runs while {one.name} waits"
    assert promised <= up


@given(fleets(reserve=False))
def test_minimum_replicas_are_there_once_plans_were_carried_out(before: FleetSnapshot) -> None:
    """Wherever one device is enough, and no more models than devices that can be had."""
    models = tuple(msgspec.structs.replace(each, devices=1, min_replicas=1) for each in before.models)
    now = msgspec.structs.replace(
        before,
        models=models,
        replicas=tuple(each for each in before.replicas if len(each.devices) == 1),
    )
    firm = {device for each in now.jobs if not each.preemptible for device in each.on}
    room = sum(1 for view in now.devices if view.up and view.id not in firm)
    for _ in range(6):
        now = settled(carried_out(now, plan(now)), 60)
    up = {view.id for view in now.devices if view.up}
    serving = {
        each.model
        for each in now.replicas
        if each.phase is not Phase.DRAINING and not each.batch_only and set(each.devices) <= up
    }
    if room >= len(models):
        assert serving == {each.name for each in models}


def nodes_of(where: FleetSnapshot, name: str = "qwen") -> list[str]:
    return sorted(
        each.devices[0].split("/")[0]
        for each in where.replicas
        if each.model == name and each.phase is not Phase.DRAINING and not each.batch_only
    )


def test_a_minimum_is_on_different_nodes_and_more_are_packed() -> None:
    views = devices(4, 4, 4)
    two = carried_out(before := snapshot(views, models=[model(min_replicas=2)]), plan(before))
    assert nodes_of(two) == ["n0", "n1"], "one node that is lost takes only one of them"
    more = msgspec.structs.replace(settled(two, 60), models=(model(min_replicas=2, work=3600.0),))
    assert nodes_of(carried_out(more, plan(more))) == ["n0"] * 4 + ["n1"], "whole nodes are left for gangs"


def test_a_minimum_is_on_one_node_when_there_is_no_other_or_none_as_good() -> None:
    two = model(min_replicas=2)
    for views, chat in (
        (devices(4), two),
        (devices(2) + devices(4, kind="h20", first=1), msgspec.structs.replace(two, kinds=("h100", "h20"))),
    ):
        before = snapshot(views, models=[chat])
        assert nodes_of(carried_out(before, plan(before))) == ["n0", "n0"]
    before = snapshot(devices(2) + devices(4, kind="h20", first=1), models=[two])
    assert nodes_of(carried_out(before, plan(before))) == ["n0", "n1"], "any kind is as good as another"


def test_a_minimum_that_makes_others_give_way_goes_apart_unless_that_breaks_more() -> None:
    views = devices(2, 2)
    running = [job("here", 1, ["n0/1"], unsaved_s=0.0), job("there", 1, ["n1/0"], unsaved_s=500.0)]
    firm = job("firm", 1, ["n1/1"], preemptible=False)
    chat, first = model(min_replicas=2), replica("a", "qwen", "n0/0")
    before = snapshot(views, models=[chat], replicas=[first], jobs=[*running, firm])
    assert [each.job for each in plan(before).preempt_jobs] == ["there"]
    gang = job("gang", 2, ["n1/0", "n1/1"], unsaved_s=500.0)
    before = snapshot(views, models=[chat], replicas=[first], jobs=[running[0], gang])
    assert [each.job for each in plan(before).preempt_jobs] == ["here"], "no gang is broken for it"


def test_replicas_that_stay_and_that_are_taken_back_are_apart() -> None:
    views, chat = devices(4, 4), model(min_replicas=2, peak=0.0)
    here = [replica(name, "qwen", on, in_flight=2) for name, on in (("a", "n0/0"), ("b", "n0/1"))]
    alone = replica("c", "qwen", "n1/0", in_flight=0)
    before = snapshot(views, models=[chat], replicas=[*here, alone])
    assert nodes_of(carried_out(before, plan(before))) == ["n0", "n1"], "though it is the least busy one"
    lent = [replica("b", "qwen", "n0/1", batch_only=True), replica("c", "qwen", "n1/0", batch_only=True, filler=3)]
    before = snapshot(views, models=[chat], replicas=[here[0], *lent], backlogs=[LINES])
    assert [(lent.replica, lent.batch_only) for lent in plan(before, Rules(lend_replicas=True)).lend_replicas] == [
        ("c", False)
    ]


@given(
    st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=5),
    st.sets(st.integers(0, 15), max_size=8),
    st.integers(1, 2),
    st.integers(2, 3),
)
@examples(1.5)
def test_a_minimum_is_on_as_many_nodes_as_it_can_be(sizes: list[int], busy: set[int], size: int, replicas: int) -> None:
    views = devices(*sizes)
    taken = [view.id for index, view in enumerate(views) if index in busy]
    jobs = [job(f"on {device}", 1, [device], preemptible=False) for device in taken]
    before = snapshot(views, models=[model(min_replicas=replicas, devices=size)], jobs=jobs)
    used = nodes_of(carried_out(before, plan(before)))
    free = Counter(view.node for view in views if view.id not in taken)
    assert len(used) == min(replicas, sum(count // size for count in free.values()))
    assert len(set(used)) == min(len(used), sum(count >= size for count in free.values()))
