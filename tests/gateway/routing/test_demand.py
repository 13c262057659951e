"""What a gateway process tells the tide: counts, and nothing twice."""

from tests.support.data_plane import Start
from tests.support.upstream import DONE, Asked, Caller, finish, role, usage, word
from tidemill.gateway.routing.demand import DemandCounter, ModelSeen
from tidemill.tides.buckets import bucket_of
from tidemill.tides.state import Objective


async def streams(asked: Asked, caller: Caller) -> None:
    await caller.stream(role(), *(word("a") for _ in range(9)), finish(), usage(100, 10, 40), DONE)


async def test_what_was_expected_is_corrected_by_what_it_was(start: Start) -> None:
    plane, _ = await start(streams, objective=Objective(ttft_s=60.0, tpot_s=60.0))
    demand: DemandCounter = plane.routes.by_name["mock"].demand
    assert demand.take() is None
    for _ in range(3):
        assert (await plane.ask(stream=True)).status == 200
    await plane.settled()
    load = plane.routes.take_load()
    seen = load.seen["mock"]
    assert (seen.arrivals, seen.ended, seen.late) == (3, 3, 0)
    assert seen.work == 3 * (100 - 40 + 5 * 10)
    assert sum(seen.ttft.values()) == sum(seen.tpot.values()) == 3
    assert load.replicas["mock/0"].done == seen.work
    assert (load.replicas["mock/0"].people, load.replicas["mock/0"].filler) == (0, 0)
    assert plane.routes.take_load().seen == {}, "it is told once"
    assert plane.routes.take_load().replicas == {}


async def test_what_misses_the_objective_is_late(start: Start) -> None:
    plane, _ = await start(streams, objective=Objective(ttft_s=0.0, tpot_s=60.0))
    assert (await plane.ask(stream=True)).status == 200
    await plane.settled()
    assert plane.routes.take_load().seen["mock"].late == 1


async def test_what_the_engine_loses_is_late(start: Start) -> None:
    async def lost(asked: Asked, caller: Caller) -> None:
        caller.reset()

    plane, _ = await start(lost, objective=Objective(ttft_s=60.0))
    assert (await plane.ask(stream=True)).status == 502
    await plane.settled()
    seen = plane.routes.take_load().seen["mock"]
    assert (seen.arrivals, seen.ended, seen.late, seen.work) == (1, 1, 1, 0)


def test_a_report_is_small() -> None:
    """At most so many buckets, whatever the times: a process that is never asked keeps no more."""
    assert bucket_of(2**63) < 512
    assert ModelSeen().ttft == {}
