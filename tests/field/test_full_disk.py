"""A full disk: nothing is accepted that cannot be metered, the error says why, and it goes on by itself afterwards.

Peers: usage is kept in memory while it cannot be written, and the oldest is dropped (gpustack/gpustack 4523); spend
rows are missing (BerriAI/litellm 15740, 40100).
"""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.field.books import check_books
from tests.field.load import Load, Stream, statuses
from tests.support.disk import fill_up, small_disk
from tests.support.fleet import Fleet
from tests.support.mock import Mock
from tests.support.plane import model
from tests.support.platform import start_platform, wait_until
from tests.support.upstream import DONE, LAST_CHUNK, STREAM_HEAD, Asked, Caller, completion, finish, role, usage, word
from tests.support.upstream import usage_object as tokens
from tests.support.wire import get
from tidemill.ledger.usage import RequestStatus
from tidemill.meter.log import RECORD_RESERVE

SEGMENT = 32 * 1024
CREDITS = {"known": "100", "unknown": "100"}
DATA_KIB = 48 * 1024
TOKENS = 60


async def test_what_cannot_be_metered_is_not_accepted_and_it_goes_on_once_there_is_room(tmp_path: Path) -> None:
    """gpustack 4523, litellm 15740: the usage log alone on a disk that fills up, down to its last byte.

    What was accepted is settled, open streams too; what comes then is refused before an engine hears of it; the
    readiness page tells load balancers.
    """
    go_on = asyncio.Event()

    async def script(asked: Asked, caller: Caller) -> None:
        if not asked.json.get("stream"):
            await caller.whole(completion(usage=tokens(10, 3)))
            return
        await caller.send(STREAM_HEAD)
        await caller.chunk(role() + word("a"))
        await go_on.wait()
        for each in (word("b"), finish(), usage(10, 2), DONE):
            await caller.chunk(each)
        await caller.send(LAST_CHUNK)

    async with AsyncExitStack() as stack:
        disk = stack.enter_context(small_disk(tmp_path / "disk", 4 * SEGMENT // 1024))
        (tmp_path / "planes").mkdir()
        fleet = Fleet(tmp_path / "planes", stack)
        (upstream,) = await fleet.engines(script)
        plane = await fleet.plane(model(upstream.port), log_directory=disk / "log", segment_bytes=SEGMENT)
        streams = await asyncio.gather(*(Stream.begin(plane.port, plane.key) for _ in range(5)))
        filler = fill_up(disk)
        served = 0
        while (answer := await plane.ask()).status == 200:
            served += 1
        assert served >= SEGMENT // RECORD_RESERVE, "the room at hand was used"
        assert (answer.status, answer.error["code"]) == (503, "metering_unavailable")
        assert answer.error["message"].startswith(
            "The gateway's disk is full, so requests cannot be metered and are refused."
        )
        assert int(answer.headers["retry-after"]) >= 1
        page = await plane.send(get("/readyz"))
        assert (page.status, page.json["status"]) == (503, "metering_unavailable")
        assert len(upstream.asked) == served + 5, "no engine has worked for nothing"

        go_on.set()
        for stream in await asyncio.gather(*(stream.read() for stream in streams)):
            assert stream.done and stream.error is None
        filler.unlink()
        async with asyncio.timeout(60):
            while (await plane.ask()).status != 200:
                await asyncio.sleep(0.05)
        assert (await plane.send(get("/readyz"))).status == 200
        records = await plane.settled()
        assert len(records) == served + len(streams) + 1 == len(upstream.asked)
        assert {each.status for each in records} == {RequestStatus.OK}


@pytest.mark.slow
async def test_a_disk_that_fills_up_under_the_whole_platform(tmp_path: Path) -> None:
    """gpustack 4523, litellm 15740: log, live table and database on one disk that fills up under open streams.

    They go on to their end. Who has money leased is served as long as the log has room, who has none is told why. A
    gateway process that dies meanwhile comes back with the room. Each answer is a record in the end.
    """
    with Mock() as mock, small_disk(tmp_path / "data", DATA_KIB) as data:
        platform = await asyncio.to_thread(start_platform, tmp_path, mock.config())
        try:
            keys = {name: platform.new_tenant(name, credit) for name, credit in CREDITS.items()}
            known = Load(platform.port, {"known": keys["known"]}, clients=2)
            unknown = Load(platform.port, {"unknown": keys["unknown"]}, clients=1)
            known.start()
            slow = {"max_tokens": TOKENS, "mock": {"chunks": TOKENS, "interval_ms": 25}}
            streams = [await Stream.begin(platform.port, keys["known"], **slow) for _ in range(20)]
            await asyncio.gather(*(stream.read(tokens=3) for stream in streams))

            filler = fill_up(data)
            unknown.start()
            await asyncio.gather(*(stream.read() for stream in streams))
            await asyncio.gather(known.stop(), unknown.stop())
            assert all(stream.done and stream.error is None and stream.tokens == TOKENS for stream in streams)
            assert statuses(known.told).keys() == {200}
            assert statuses(unknown.told).keys() == {503}
            for each in unknown.told:
                assert each.message.startswith("Your balance cannot be checked now: the database does not answer")
            with platform.admin as admin:
                refused = admin.post("tenants", json={"name": "another"})
                assert refused.status_code == 503 and "full" in refused.json()["error"]["message"]

            platform.kill9("gateway")
            await asyncio.sleep(1.0)  # what is started in its place finds no room for its log
            filler.unlink()
            back = Load(platform.port, {"unknown": keys["unknown"]}, clients=1)
            back.start()
            await asyncio.to_thread(wait_until, lambda: 200 in statuses(back.told), 20)
            await back.stop()
        finally:
            await asyncio.to_thread(platform.stop)
        records = check_books(platform, CREDITS)
        assert len(records["known"]) == len(known.told) + len(streams)
        assert len(records["unknown"]) == statuses(back.told)[200]
        by_id = {each.request_id: each for each in records["known"]}
        assert all(by_id[stream.request_id].usage.completion == TOKENS for stream in streams)
