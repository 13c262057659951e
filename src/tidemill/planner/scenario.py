"""The day that `bench/tides_sim.py` simulates.

256 devices in nodes of eight, four models, three queues of jobs.

The models' step times are rooflines of an H100 SXM (3.35 TB/s, 990 TFLOP/s dense in 8 bits, about 60% of either
reached), 8-bit weights, rounded: weights read once a step (`base`), two operations a parameter and token (`prefill`),
the cache read (`kv`). They make replicas of four sizes and speeds, and are no claim about these models.
"""

import random

import msgspec

from tidemill.planner.arrivals import Day, Trace, daily_curve, history_of, requests_of
from tidemill.planner.fleet_model import SimulatedModel
from tidemill.planner.model_run import FORECAST_S, DemandStream
from tidemill.planner.simulate import Scenario
from tidemill.planner.work_model import SimulatedBatchSpec, SimulatedJobSpec
from tidemill.tides.forecast import DAY_S
from tidemill.tides.slack import StepTime
from tidemill.tides.state import DeviceView, Objective, QueueView


class Shape(msgspec.Struct, frozen=True):
    """How the scenario's models share the fleet."""

    spec: SimulatedModel
    trace: str
    peak_share: float
    """Of the fleet's devices, busy with it at its peak."""
    surge_at_s: float | None = None
    surge: float = 1.0


def models(conv: Trace, code: Trace) -> list[Shape]:
    """The four models."""
    chat = {"prompt": conv.prompt, "output": conv.output}
    source = {"prompt": code.prompt, "output": code.output}
    objective = Objective(2.0, 0.05, 0.95)
    return [
        Shape(
            SimulatedModel(
                name="reasoner-671b",
                devices=8,
                steps=StepTime(0.012, 1.6e-5, 1.0e-4, 3.0e-9),
                objective=Objective(4.0, 0.06, 0.95),
                slots=256,
                kv_tokens=2.5e6,
                startup_s=240.0,
                prompt=conv.prompt,
                output=conv.output * 5,
            ),
            "conv",
            0.16,
        ),
        Shape(
            SimulatedModel(
                name="chat-70b",
                devices=4,
                steps=StepTime(0.010, 5.9e-5, 8.0e-5, 2.0e-8),
                objective=objective,
                slots=256,
                kv_tokens=8e5,
                startup_s=120.0,
                **chat,
            ),
            "conv",
            0.17,
            surge_at_s=15.0 * 3600,
            surge=1.6,
        ),
        Shape(
            SimulatedModel(
                name="code-32b",
                devices=2,
                steps=StepTime(0.009, 5.4e-5, 6.0e-5, 3.0e-8),
                objective=objective,
                slots=192,
                kv_tokens=3e5,
                startup_s=90.0,
                **source,
            ),
            "code",
            0.12,
        ),
        Shape(
            SimulatedModel(
                name="small-8b",
                devices=1,
                steps=StepTime(0.005, 2.7e-5, 4.0e-5, 4.0e-8),
                objective=Objective(1.0, 0.03, 0.95),
                slots=192,
                kv_tokens=3e5,
                startup_s=45.0,
                **chat,
            ),
            "conv",
            0.07,
            surge_at_s=4.0 * 3600,
            surge=2.0,
        ),
    ]


def fleet(devices: int, per_node: int = 8) -> tuple[DeviceView, ...]:
    return tuple(
        DeviceView(f"n{number // per_node:03}/{number % per_node}", f"n{number // per_node:03}", "h100")
        for number in range(devices)
    )


def a_day(conv: Trace, code: Trace, *, devices: int = 256, seed: int = 1, hours: float = 24.0) -> Scenario:
    """The scenario. Equal seeds give equal days."""
    chance = random.Random(seed)
    traces = {"conv": conv, "code": code}
    streams = []
    for number, shape in enumerate(models(conv, code)):
        spec, trace = shape.spec, traces[shape.trace]
        if spec.output != trace.output:  # longer answers than the trace's, in the same pattern
            ratio = spec.output / trace.output
            trace = Trace(
                tuple(msgspec.structs.replace(each, output=each.output * ratio) for each in trace.bins), trace.bin_s
            )
        # A load test: an hour at the peak of the curve, on as many replicas as it needs.
        rate = shape.peak_share * devices / spec.devices * 0.75 * spec.capacity() / (spec.prompt + 5 * spec.output)
        hour = requests_of(Day(peak_rate=rate, trough=1.0), trace, seed, 3600.0)
        capacity = spec.measured(hour, trace.bin_s)
        peak = shape.peak_share * devices / spec.devices * 0.75 * capacity
        day = Day(
            peak_rate=peak / (spec.prompt + 5 * spec.output),
            noise=0.05,
            level=chance.uniform(0.95, 1.08),
            surge_at_s=shape.surge_at_s,
            surge=shape.surge,
        )
        before = history_of(14, spec.work, day, trace, seed + number, FORECAST_S)
        streams.append(
            DemandStream(
                spec=spec,
                bins=requests_of(day, trace, seed * 100 + number, hours * 3600),
                capacity=capacity,
                before=before,
                first_replicas=max(round(shape.peak_share * devices / spec.devices * daily_curve(0.0)), 1) + 1,
            )
        )
    return Scenario(
        devices=fleet(devices),
        streams=tuple(streams),
        queues=(
            QueueView(name="research", quota=devices // 8, weight=2.0),
            QueueView(name="product", quota=devices // 8),
            QueueView(name="students"),
        ),
        jobs=tuple(_jobs(chance, devices)),
        batches=tuple(_batches(streams, devices)),
        step_s=conv.bin_s,
        seed=seed,
    )


def _jobs(chance: random.Random, devices: int) -> list[SimulatedJobSpec]:
    """Training jobs, more than the fleet can do in a day: half of them are there when it begins."""
    jobs: list[SimulatedJobSpec] = []
    left = devices * 24 * 3600 * 0.7
    while left > 0:
        number = len(jobs)
        size = chance.choice([1, 1, 2, 4, 8, 8, 8, 16, 16, 32, 64 if devices >= 256 else 8])
        size = min(size, devices // 4)
        run_s = chance.uniform(0.5, 5.0) * 3600
        submitted = 0.0 if chance.random() < 0.5 else chance.uniform(0, DAY_S * 0.8)
        due = None
        if chance.random() < 0.2 and size <= 16:
            due = submitted + run_s * chance.uniform(2.5, 4.0) + 1800
        jobs.append(
            SimulatedJobSpec(
                id=f"j{number:04}",
                queue=chance.choice(["research", "research", "product", "students"]),
                devices=size,
                submitted_at=submitted,
                run_s=run_s,
                deadline=due,
                checkpoint_s=chance.uniform(5, 40),
                restore_s=chance.uniform(30, 90),
            )
        )
        left -= size * run_s
    return jobs


def _batches(streams: list[DemandStream], devices: int) -> list[SimulatedBatchSpec]:
    """Batches for the models, with windows of a few hours up to all day."""
    plans = {
        "reasoner-671b": (0.115, (0, 3, 6, 9, 12, 15, 18, 20, 22), 8),
        "chat-70b": (0.115, (0, 3, 6, 9, 12, 15, 18, 20, 22), 7),
        "code-32b": (0.11, (0, 4, 8, 12, 15, 18, 20, 22), 9),
        "small-8b": (0.06, (0, 4, 8, 12, 15, 18, 20, 22), 6),
    }
    batches = []
    for stream in streams:
        share, hours, window = plans.get(stream.spec.name, (0.0, (), 0))
        for hour in hours:
            whole = share * devices / stream.spec.devices * stream.spec.best_filler() * DAY_S
            batches.append(
                SimulatedBatchSpec(
                    model=stream.spec.name,
                    submitted_at=hour * 3600.0,
                    deadline=(hour + window) * 3600.0,
                    work=whole / len(hours),
                )
            )
    return batches


def peak_replicas(scenario: Scenario, target: float) -> dict[str, int]:
    """Replicas that a model needs at the highest quarter of an hour of its days before, plus a tenth."""
    found = {}
    for stream in scenario.streams:
        width = max(round(900 / FORECAST_S), 1)
        means = [
            sum(stream.before[index : index + width]) / width for index in range(0, len(stream.before) - width, width)
        ]
        found[stream.spec.name] = max(-int(-max(means) * 1.1 // (stream.capacity * target)), 1)
    return found
