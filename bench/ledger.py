"""`make bench-ledger`: what the loader costs a usage record, in processor time.

    .venv/bin/python bench/ledger.py [--quick] [--fill N] [--records N] [--tenants 1,200] [--store sqlite,postgresql]

Settled requests of so many tenants lie in the usage log of a gateway process that still runs; the loader drains them,
a hundred records a transaction, as it does under a steady load. It is measured in a new store, and once more behind
`--fill` records that are stored already. Tenants come evenly at random. Each has a balance, and a lease of the process.

Printed are microseconds of this process's processor time for a record, the median of `--rounds`. PostgreSQL's is that
of its client alone; what its server used is beside it. The server is a private one, started for this run, without
fsync; without a PostgreSQL on the machine that half is left out.
"""

import argparse
import fcntl
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from sqlalchemy import insert, text
from tests.store.databases import PostgresServer, postgres_binaries
from tidemill.ledger.pricing import Price
from tidemill.ledger.usage import RequestStatus, TokenUsage
from tidemill.meter import loader as loader_module
from tidemill.meter.frames import END_OF_SEGMENT, HEADER, frame, segment_path
from tidemill.meter.loader import LOCK_FILE, Loader
from tidemill.meter.records import Opened, encode_settled, settle
from tidemill.store.engine import Store, open_store, store_url
from tidemill.store.migrate import migrate
from tidemill.store.tables.money import accounts, leases
from tidemill.store.tables.tenants import tenants

WORKER = "gw0-bench"
PRICE = Price.of(input=4_000_000_000, cached_input=1_000_000_000, output=16_000_000_000)
START_US = 1_792_065_600_000_000
A_SEGMENT = 10_000
"""Records in a segment of the log."""
FILL_BATCH = 2_000
BALANCE = 10**17
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def settled_requests(count: int, tenant_ids: list[str], first: int, chance: random.Random) -> Iterator[bytes]:
    """So many settled requests, as the gateway writes them: ids in order, tenants at random."""
    for number in range(first, first + count):
        at = START_US + number * 1000
        opened = Opened(
            request_id=f"req_7f3a9c2e5b1d4f60{number:08x}",
            tenant_id=chance.choice(tenant_ids),
            key_id="key_4f8s0v9d2c6h1j7k",
            model="deepseek-r1",
            replica="deepseek-r1/0#life_1",
            price_id="prc_5g9t1w0e3d7j2k8m",
            currency="USD",
            price=PRICE,
            streamed=True,
            started_us=at,
        )
        usage = TokenUsage(chance.randrange(10, 4000), 0, chance.randrange(1, 900))
        record = settle(
            opened,
            usage,
            status=RequestStatus.OK,
            estimated=False,
            hold=10**12,
            first_token_us=at + 200_000,
            finished_us=at + 900_000,
            device_ns=700_000_000,
        )
        yield encode_settled(record)


class UsageLogOnDisk:
    """The directory of a gateway process that is alive: its lock is held here."""

    def __init__(self, meter_dir: Path) -> None:
        self.directory = meter_dir / WORKER
        self.directory.mkdir(parents=True)
        self._lock = os.open(self.directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._segment = 0

    def write(self, payloads: Iterator[bytes]) -> None:
        """Add records to the log, in new segments."""
        batch: list[bytes] = []
        for payload in payloads:
            batch.append(frame(payload))
            if len(batch) == A_SEGMENT:
                self._flush(batch)
        self._flush(batch)

    def _flush(self, batch: list[bytes]) -> None:
        self._segment += 1
        segment_path(self.directory, self._segment).write_bytes(b"".join(batch) + HEADER.pack(END_OF_SEGMENT, 0))
        batch.clear()


def new_tenants(store: Store, count: int) -> list[str]:
    """Tenants with a balance and a lease."""
    ids = [f"ten_{number:016x}" for number in range(count)]
    with store.write() as connection:
        connection.execute(
            insert(tenants),
            [{"tenant_id": each, "name": each, "currency": "USD", "created_at": START_US, "weight": 1} for each in ids],
        )
        connection.execute(
            insert(accounts), [{"account": f"tenant:{each}", "currency": "USD", "balance": BALANCE} for each in ids]
        )
        connection.execute(
            insert(leases), [{"worker_id": WORKER, "tenant_id": each, "amount": BALANCE // 2} for each in ids]
        )
    return ids


class Measured:
    """A store that is filled and measured by the loader itself."""

    def __init__(self, store: Store, meter_dir: Path, tenant_count: int, server: int | None) -> None:
        self._store = store
        self._log = UsageLogOnDisk(meter_dir)
        self._tenants = new_tenants(store, tenant_count)
        self._loader = Loader(store, meter_dir, zone="Asia/Shanghai")
        self._chance = random.Random(tenant_count)
        self._count = 0
        self._server = server
        if not store.is_sqlite:
            with store.engine.begin() as connection:
                connection.execute(text("ANALYZE"))

    def fill(self, records: int) -> None:
        """Store records in large transactions, unmeasured."""
        loader_module.BATCH_RECORDS = FILL_BATCH
        self._load(records)

    def cost(self, records: int, batch: int) -> tuple[float, float]:
        """Store records, `batch` in a transaction; gives microseconds a record, of this process and of the server."""
        loader_module.BATCH_RECORDS = batch
        self._write(records)
        server, began = self._server_s(), time.process_time()
        loaded = self._loader.drain().records
        used, by_server = time.process_time() - began, self._server_s() - server
        assert loaded == records, f"{loaded} of {records} records were loaded"
        return used / records * 1e6, by_server / records * 1e6

    def _load(self, records: int) -> None:
        step = 100_000
        for at in range(0, records, step):
            self._write(min(step, records - at))
            self._loader.drain()

    def _write(self, records: int) -> None:
        self._log.write(settled_requests(records, self._tenants, self._count, self._chance))
        self._count += records

    def _server_s(self) -> float:
        """Processor seconds of the server's processes, those that have ended included."""
        if self._server is None:
            return 0.0
        total = 0
        for pid in (self._server, *_children(self._server)):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:13])) + (sum(map(int, fields[13:15])) if pid == self._server else 0)
        return total / CLOCK_TICKS


def _children(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def measure(kind: str, count: int, args: argparse.Namespace, server: PostgresServer | None) -> dict[str, Any]:
    """The figures of one store and number of tenants."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tm-bench-")))
        pid = None
        if server is None:
            url = store_url(None, directory)
        else:
            url = store_url(server.url(server.create()), directory)
            assert server._process is not None
            pid = server._process.pid
        store = open_store(url)
        stack.callback(store.close)
        migrate(store)
        measured = Measured(store, directory / "meter", count, pid)
        measured.cost(args.batch * 5, args.batch)  # compiled, and in the caches
        found: dict[str, Any] = {"store": kind, "tenants": count}
        for when, fill in (("new", 0), ("filled", args.fill)):
            if fill:
                measured.fill(fill)
            costs = [measured.cost(args.records, args.batch) for _ in range(args.rounds)]
            found[when] = statistics.median(own for own, _ in costs)
            found[f"{when}_server"] = statistics.median(other for _, other in costs)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description="What the loader costs a usage record.")
    parser.add_argument("--quick", action="store_true", help="fewer records and tenants: about a minute")
    parser.add_argument("--fill", type=int, help="records that are stored before the second measurement [1000000]")
    parser.add_argument("--records", type=int, help="records in a round [20000]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=100, help="records in a transaction")
    parser.add_argument("--tenants", help="numbers of tenants, with commas [1,200,2000,10000]")
    parser.add_argument("--store", default="sqlite,postgresql")
    args = parser.parse_args()
    args.fill = args.fill if args.fill is not None else 50_000 if args.quick else 1_000_000
    args.records = args.records or (5_000 if args.quick else 20_000)
    counts = [int(each) for each in (args.tenants or ("1,2000" if args.quick else "1,200,2000,10000")).split(",")]
    print(f"CPU us a record, {args.batch} records a transaction; filled: behind {args.fill:,} records", flush=True)
    print(f"{'store':<12}{'tenants':>8}{'new':>9}{'filled':>9}{'server, new':>14}{'server, filled':>16}", flush=True)
    for kind in args.store.split(","):
        with ExitStack() as stack:
            server = None
            if kind == "postgresql":
                binaries = postgres_binaries()
                if binaries is None:
                    print("postgresql: no server is installed here")
                    continue
                server = PostgresServer(binaries)
                stack.callback(server.stop)
                server.start()
            for count in counts:
                row = measure(kind, count, args, server)
                servers = "".join(
                    f"{row[name]:>{width}.1f}" if server else f"{'':>{width}}"
                    for name, width in (("new_server", 14), ("filled_server", 16))
                )
                print(f"{kind:<12}{count:>8,}{row['new']:>9.1f}{row['filled']:>9.1f}{servers}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
