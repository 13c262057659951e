"""The simulated fleet: small days, so that the policies can be compared in seconds. The day of the bench is longer."""

import msgspec
import pytest

from tests.planner.test_fleet_model import SPEC
from tidemill.planner.arrivals import ArrivalBin, Day, Trace, history_of, requests_of
from tidemill.planner.model_run import DemandStream
from tidemill.planner.policies import SchedulingPolicy, alone, kueue_like, reactive, static, tide
from tidemill.planner.scenario import a_day, fleet, peak_replicas
from tidemill.planner.simulate import Scenario, Simulation, SimulationResult
from tidemill.planner.work_model import SimJob, SimulatedBatchSpec, SimulatedJobSpec
from tidemill.tides.rules import RULES
from tidemill.tides.state import JobPhase

COUNTS = [8 + index % 7 for index in range(900)]
TRACE = Trace(tuple(ArrivalBin(count, 1155.0 * count, 211.0 * count) for count in COUNTS), 4.0)
DEVICES = 32


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    """Six hours: one model that needs up to half of the fleet, batches, and more jobs than there is room for."""
    capacity = SPEC.capacity()
    day = Day(peak_rate=DEVICES / 2 / 4 * 0.7 * capacity / (SPEC.prompt + 5 * SPEC.output), noise=0.03)
    bins = requests_of(day, TRACE, seed=1, seconds=6 * 3600)
    stream = DemandStream(
        spec=SPEC,
        bins=bins,
        capacity=capacity,
        before=history_of(3, SPEC.work, day, TRACE, seed=2)[: 3 * 288],
        first_replicas=2,
    )
    jobs = tuple(
        SimulatedJobSpec(
            id=f"j{number}",
            queue="research",
            devices=(1, 2, 4, 8)[number % 4],
            submitted_at=number * 300.0,
            run_s=3600.0 + 600 * (number % 5),
            deadline=number * 300.0 + 15_000 if number % 4 == 1 else None,
        )
        for number in range(40)
    )
    batches = tuple(
        SimulatedBatchSpec(model="chat", submitted_at=at, deadline=at + 10_000, work=5e7)
        for at in (0.0, 3600.0, 7200.0, 9000.0, 12_000.0, 15_000.0)
    )
    return Scenario(
        devices=fleet(DEVICES), streams=(stream,), jobs=jobs, batches=batches, step_s=4.0, plan_every_s=20.0
    )


@pytest.fixture(scope="module")
def figures(scenario: Scenario) -> dict[str, SimulationResult]:
    peak = peak_replicas(scenario, RULES.target)
    ours = sum(count * 4 for count in peak.values())
    policies: list[SchedulingPolicy] = [
        tide(RULES),
        alone(peak, RULES),
        static(peak, ours, RULES),
        reactive(ours, RULES),
        kueue_like(RULES),
    ]
    return {each.name: Simulation(scenario, each).run() for each in policies}


@pytest.mark.slow
def test_the_tide_fills_the_fleet_and_keeps_deadlines_and_objective(figures: dict[str, SimulationResult]) -> None:
    best = figures["tide"]
    assert best.fill > 0.85
    assert best.deadlines_kept == best.deadlines > 5
    assert best.kept > figures["interactive alone"].kept - 0.01


@pytest.mark.slow
def test_no_base_line_fills_it_as_well(figures: dict[str, SimulationResult]) -> None:
    best = figures.pop("tide")
    assert all(each.fill < best.fill for each in figures.values())
    figures["tide"] = best


def test_a_day_is_the_same_each_time(scenario: Scenario) -> None:
    short = msgspec.structs.replace(
        scenario, streams=(msgspec.structs.replace(scenario.streams[0], bins=scenario.streams[0].bins[:450]),)
    )
    assert Simulation(short, tide(RULES)).run() == Simulation(short, tide(RULES)).run()


def test_no_device_has_two_holders_at_any_time(scenario: Scenario) -> None:
    short = msgspec.structs.replace(
        scenario, streams=(msgspec.structs.replace(scenario.streams[0], bins=scenario.streams[0].bins[:1350]),)
    )
    policy = tide(RULES)
    snapshots = []

    def decide(snapshot):  # type: ignore[no-untyped-def]
        snapshots.append(snapshot)
        return policy.decide(snapshot)

    Simulation(short, msgspec.structs.replace(policy, decide=decide)).run()
    for each in snapshots:
        held = [device for one in (*each.replicas,) for device in one.devices]
        held += [device for one in each.jobs for device in one.on]
        assert len(held) == len(set(held))


def test_the_scenario_of_the_bench_needs_what_it_says() -> None:
    day = a_day(TRACE, TRACE, devices=64, hours=1.0)
    assert sum(job.devices * job.run_s for job in day.jobs) > 0.6 * 64 * 86_400
    assert day == a_day(TRACE, TRACE, devices=64, hours=1.0)
    peak = peak_replicas(day, RULES.target)
    used = sum(peak[each.spec.name] * each.spec.devices for each in day.streams)
    assert 0.4 * 64 < used < 64


def test_a_job_goes_on_where_its_checkpoint_was() -> None:
    job = SimJob(SimulatedJobSpec(id="j", queue="q", devices=2, submitted_at=0.0, run_s=1000.0, restore_s=60.0))
    job.start(("a", "b"), 0.0)
    assert job.advance(0.0, 100.0) == 40.0
    job.preempt(100.0)
    assert job.advance(100.0, 10.0) == 0.0 and job.phase is JobPhase.STOPPING
    job.advance(110.0, 20.0)
    assert job.phase is JobPhase.QUEUED and job.saved_s == 40.0
    job.start(("a", "b"), 200.0)
    job.advance(200.0, 1020.0)
    assert job.ended_at is not None and job.done_s == 1000.0
    job = SimJob(SimulatedJobSpec(id="k", queue="q", devices=1, submitted_at=0.0, run_s=1000.0, restore_s=0.0))
    job.start(("a",), 0.0)
    job.advance(0.0, 300.0)
    job.lose()
    assert job.done_s == 0.0 and job.lost_s == 300.0
