"""What a gateway process counts for `/metrics` agrees with the records that it writes."""

import msgspec

from tests.support.data_plane import Start
from tests.support.fleet import either
from tests.support.upstream import Asked, Caller
from tidemill.gateway.metrics import MAX_CODES, MetricsSnapshot, RequestMetrics, process_gauges
from tidemill.meter.histogram import Histogram


async def test_the_figures_agree_with_the_records(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        if asked.json.get("user") == "bad":
            await caller.whole({"error": {"message": "no"}}, status=400)
        else:
            await either(asked, caller)

    plane, _ = await start(script)
    for fields in ({}, {}, {"stream": True}, {"user": "bad"}):
        await plane.ask(**fields)
    assert (await plane.ask(key="sk-tm-none")).status == 401
    assert (await plane.ask(model="none")).status == 404
    records = await plane.settled()
    figures = plane.meter.metrics.figures(plane.leasing, plane.log)
    of_model = figures.models["mock"]["standard"]
    assert of_model.requests == {"ok": 3, "engine_error": 1}
    assert of_model.prompt == sum(each.prompt for each in records) == 300
    assert of_model.completion == sum(each.completion for each in records) == 22
    assert sum(of_model.ttft.counts) == sum(each.first_token_us > 0 for each in records) == 1
    assert sum(of_model.tpot.counts) == 1
    assert figures.refused == {"invalid_api_key": 1, "model_not_found": 1}
    assert figures.shortages == 1, "the first request found an empty wallet"
    assert figures.records == 4
    assert figures.commits is not None and sum(figures.commits.counts) == plane.log.commits
    now = process_gauges(plane.routes, plane.queues.queued())
    assert (now.active, now.queued, now.broken) == ({"mock/0": 0}, {}, [])


async def test_a_replica_in_trouble_shows_as_broken(start: Start) -> None:
    async def script(asked: Asked, caller: Caller) -> None:
        caller.reset()

    plane, upstream = await start(script)
    await upstream.stop()
    for _ in range(3):
        await plane.ask()
    assert process_gauges(plane.routes, {}).broken == ["mock/0"]


def test_figures_add_up_and_survive_the_pipe() -> None:
    def one(count: int) -> MetricsSnapshot:
        metrics = RequestMetrics()
        for _ in range(count):
            metrics.refuse("overloaded")
        commits = Histogram((10, 20))
        commits.note(15)
        return MetricsSnapshot(refused=metrics._refused, shortages=count, records=2 * count, commits=commits)

    total = MetricsSnapshot()
    for count in (1, 2):
        total.add(msgspec.json.decode(msgspec.json.encode(one(count)), type=MetricsSnapshot))
    assert (total.refused, total.shortages, total.records) == ({"overloaded": 3}, 3, 6)
    assert total.commits is not None and total.commits.counts == [0, 2, 0]


def test_codes_are_bounded() -> None:
    metrics = RequestMetrics()
    for number in range(MAX_CODES * 3):
        metrics.refuse(f"code{number}")
    assert len(metrics._refused) <= MAX_CODES + 1
    assert sum(metrics._refused.values()) == MAX_CODES * 3
