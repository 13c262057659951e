"""Replicas that sleep hold nothing, and wake where they slept."""

from tests.tides.fleets import NOW, carried_out, devices, job, model, replica, settled, snapshot
from tidemill.tides.plan import plan
from tidemill.tides.state import Phase, Plan, StopReplica

FOUR = devices(4)
IDS = [view.id for view in FOUR]
OLD = NOW - 10_000


def stops(decided: Plan) -> dict[str, bool]:
    """Replicas that go, and whether to sleep."""
    return {each.replica: each.sleep for each in decided.stop_replicas}


def wakes(decided: Plan) -> list[str | None]:
    return [each.wake for each in decided.start_replicas]


def test_who_is_given_up_sleeps_as_many_as_may() -> None:
    chat = model(min_replicas=0, idle_s=1e6, sleepers=1)
    three = [replica(name, "qwen", IDS[index], since=OLD) for index, name in enumerate("abc")]
    decided = plan(snapshot(FOUR, models=[chat], replicas=three))
    assert sorted(stops(decided).values()) == [False, False, True]
    asleep = replica("z", "qwen", IDS[3], phase=Phase.ASLEEP, since=OLD)
    decided = plan(snapshot(FOUR, models=[chat], replicas=[*three, asleep]))
    assert set(stops(decided)) == {"a", "b", "c"} and not any(stops(decided).values()), "one sleeps already"
    assert not plan(snapshot(FOUR, models=[chat], replicas=[asleep])).stop_replicas


def test_only_one_that_is_ready_sleeps() -> None:
    chat = model(min_replicas=0, idle_s=1e6, sleepers=4)
    young = replica("a", "qwen", IDS[0], phase=Phase.WARMING, since=OLD)
    lent = replica("b", "qwen", IDS[1], batch_only=True, since=OLD)  # and its lines are done
    assert stops(plan(snapshot(FOUR, models=[chat], replicas=[young, lent]))) == {"a": False, "b": True}


def test_its_devices_are_anybodys() -> None:
    chat = model(min_replicas=0, idle_s=1e6, sleepers=1)
    asleep = replica("z", "qwen", *IDS, phase=Phase.ASLEEP)
    gang = job("train", 4)
    before = snapshot(FOUR, models=[chat], replicas=[asleep], jobs=[gang])
    decided = plan(before)
    assert [each.job for each in decided.start_jobs] == ["train"]
    idle = plan(snapshot(FOUR, models=[chat], replicas=[asleep]))
    assert [note.holder for note in idle.devices] == ["free"] * 4
    assert all("z sleeps there" in note.why for note in idle.devices)


def test_who_is_wanted_wakes_at_home() -> None:
    chat = model(work=100.0, sleepers=2)
    asleep = [replica("y", "qwen", IDS[2], phase=Phase.ASLEEP), replica("z", "qwen", IDS[3], phase=Phase.ASLEEP)]
    decided = plan(snapshot(FOUR, models=[chat], replicas=asleep))
    assert [(each.wake, each.devices) for each in decided.start_replicas] == [("y", (IDS[2],))]
    assert "y wakes on it" in decided.devices[2].why
    more = plan(snapshot(FOUR, models=[model(work=2000.0, sleepers=2)], replicas=asleep))
    assert wakes(more) == ["y", "z", None], "the third is started elsewhere"


def test_another_device_rather_than_a_job_that_gives_way() -> None:
    chat = model(work=100.0, sleepers=1)
    asleep = replica("z", "qwen", IDS[0], phase=Phase.ASLEEP)
    decided = plan(snapshot(FOUR, models=[chat], replicas=[asleep], jobs=[job("at home", 1, IDS[:1])]))
    assert wakes(decided) == [None] and not decided.preempt_jobs


def test_where_somebody_must_give_way_it_is_who_is_at_its_home() -> None:
    chat = model(work=100.0, sleepers=1)
    asleep = replica("z", "qwen", IDS[2], phase=Phase.ASLEEP)
    jobs = [job(f"j{index}", 1, [each]) for index, each in enumerate(IDS)]
    before = snapshot(FOUR, models=[chat], replicas=[asleep], jobs=jobs)
    decided = plan(before)
    assert [each.job for each in decided.preempt_jobs] == ["j2"] and not decided.start_replicas
    after = settled(carried_out(before, decided), 5.0)
    assert wakes(plan(after)) == ["z"]


def test_one_that_cannot_wake_any_more_ends() -> None:
    asleep = replica("z", "qwen", IDS[0], phase=Phase.ASLEEP)
    quiet = model(min_replicas=0, idle_s=1e6, sleepers=1)
    lost = [devices(1)[0], *FOUR[1:]]
    lost[0] = type(lost[0])(lost[0].id, lost[0].node, lost[0].kind, up=False)
    for views, models in ((tuple(lost), [quiet]), (FOUR, []), (FOUR, [model(min_replicas=0, idle_s=1e6)])):
        (stop,) = plan(snapshot(views, models=models, replicas=[asleep])).stop_replicas
        assert isinstance(stop, StopReplica) and stop.replica == "z" and not stop.sleep


def test_over_several_nodes_it_wakes_where_it_slept() -> None:
    fleet = devices(2, 2, 2)
    home = ("n1/0", "n1/1", "n2/0", "n2/1")
    asleep = replica("z", "qwen", *home, phase=Phase.ASLEEP)
    decided = plan(snapshot(fleet, models=[model(work=100.0, devices=4, spans=True, sleepers=1)], replicas=[asleep]))
    assert [(each.wake, each.devices) for each in decided.start_replicas] == [("z", home)]


def test_one_that_drains_in_order_to_sleep_counts() -> None:
    chat = model(min_replicas=0, idle_s=1e6, sleepers=1)
    dozing = replica("a", "qwen", IDS[0], phase=Phase.DRAINING, since=NOW - 1, dozing=True)
    other = replica("b", "qwen", IDS[1], since=OLD)
    assert stops(plan(snapshot(FOUR, models=[chat], replicas=[dozing, other]))) == {"b": False}


def test_a_device_that_is_free_rather_than_a_home_that_is_coming() -> None:
    chat = model(work=100.0, sleepers=1)
    asleep = replica("z", "qwen", IDS[0], phase=Phase.ASLEEP)
    leaving = replica("l", "other", IDS[0], phase=Phase.DRAINING)
    (start,) = plan(snapshot(FOUR, models=[chat], replicas=[asleep, leaving])).start_replicas
    assert start.wake is None and start.devices != (IDS[0],)


def test_an_urgent_deadline_is_not_lost_to_save_a_start() -> None:
    two = devices(2)
    asleep = replica("z", "qwen", "n0/0", phase=Phase.ASLEEP)
    urgent = job("urgent", 1, ["n0/0"], deadline=NOW + 650, remaining_s=600.0)
    cheap = job("cheap", 1, ["n0/1"])
    chat = model(work=100.0, sleepers=1)
    decided = plan(snapshot(two, models=[chat], replicas=[asleep], jobs=[urgent, cheap]))
    assert [each.job for each in decided.preempt_jobs] == ["cheap"]
