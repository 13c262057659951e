"""Requests to meter in tests."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tidemill.ledger.usage import Status, TokenUsage
from tidemill.meter.records import Opened, Settled, settle
from tidemill.store.clock import to_micros

from .conftest import OCTOBER

PRICE = (4_000_000_000, 1_000_000_000, 16_000_000_000)
"""Nanos per million tokens: 4, 1 and 16 units."""
START_US = to_micros(OCTOBER)


def opened(
    request_id: str = "req_1",
    tenant_id: str = "ten_1",
    *,
    price: tuple[int, int, int] = PRICE,
    currency: str = "CNY",
    started_us: int = START_US,
) -> Opened:
    return Opened(
        request_id=request_id,
        tenant_id=tenant_id,
        key_id="key_1",
        model="m",
        replica="m/0#life",
        price_id="prc_1",
        currency=currency,
        price=price,
        streamed=True,
        started_us=started_us,
    )


def settled(
    request: Opened,
    usage: TokenUsage = TokenUsage(100, 20, 50),  # noqa: B008
    *,
    hold: int = 10**12,
    status: Status = Status.OK,
    finished_us: int | None = None,
) -> Settled:
    return settle(
        request,
        usage,
        status=status,
        estimated=False,
        hold=hold,
        first_token_us=request.started_us + 1,
        finished_us=request.started_us + 1000 if finished_us is None else finished_us,
        device_ns=7,
    )


@contextmanager
def small_disk(path: Path, kib: int) -> Iterator[Path]:
    """A file system of its own with `kib` KiB of room; skips the test where it cannot be mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk to fill up")
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill_up(directory: Path) -> Path:
    """Leave no room on the disk of `directory`; gives the file that takes it."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return filler
