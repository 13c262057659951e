"""The log on disk: what is read is what was written, up to the first damage; and behind it what is still whole."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.disk import fill_up, small_disk
from tests.support.examples import examples
from tidemill.meter.frames import (
    END_OF_SEGMENT,
    HEADER,
    MAX_PAYLOAD,
    SEGMENT_READ_BYTES,
    allocate_segment,
    frame,
    read_frames,
    salvage_frames,
    segment_numbers,
    segment_path,
)

START = (1, 0)
MARK = HEADER.pack(END_OF_SEGMENT, 0)

payloads = st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=20)
segments = st.lists(payloads, min_size=1, max_size=4)


def lay_out(directory: Path, parts: list[list[bytes]], size: int = 4096) -> None:
    """Segments with these payloads, each but the last with its end mark, and zeros behind."""
    for number, part in enumerate(parts, 1):
        data = b"".join(map(frame, part)) + (MARK if number < len(parts) else b"")
        segment_path(directory, number).write_bytes(data.ljust(size, b"\0"))


def in_a_directory(parts: list[list[bytes]]) -> Path:
    directory = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    lay_out(directory, parts)
    return directory


def everything(directory: Path, start: tuple[int, int] = START) -> list[bytes]:
    return [each.payload for each in read_frames(directory, start)]


@given(segments)
def test_everything_is_read_from_any_position(parts: list[list[bytes]]) -> None:
    directory = in_a_directory(parts)
    frames = list(read_frames(directory, START))
    flat = [payload for part in parts for payload in part]
    assert [each.payload for each in frames] == flat
    for at, each in enumerate(frames, 1):
        assert everything(directory, each.after) == flat[at:]
    assert list(salvage_frames(directory, frames[-1].after)) == []
    shutil.rmtree(directory)


@examples(2)
@given(segments, st.data())
def test_a_flipped_bit_costs_the_frame_that_it_hits(parts: list[list[bytes]], data: st.DataObject) -> None:
    directory = in_a_directory(parts)
    number = data.draw(st.integers(1, len(parts)))
    path = segment_path(directory, number)
    used = sum(HEADER.size + len(payload) for payload in parts[number - 1]) + (len(MARK) if number < len(parts) else 0)
    at, bit = data.draw(st.integers(0, used - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1 << bit
    path.write_bytes(damaged)

    flat = [payload for part in parts for payload in part]
    frames = list(read_frames(directory, START))
    read = [each.payload for each in frames]
    assert flat[: len(read)] == read
    saved = read + list(salvage_frames(directory, frames[-1].after if frames else START))
    # In order, nothing that was never written, and at most the one that was hit is missing.
    rest = iter(flat)
    assert all(payload in rest for payload in saved)
    assert len(saved) >= len(flat) - 1
    shutil.rmtree(directory)


@given(payloads, st.data())
def test_a_torn_tail_ends_the_reading(part: list[bytes], data: st.DataObject) -> None:
    """The last write of a dying machine: any part of it may have reached the disk."""
    directory = in_a_directory([part])
    path = segment_path(directory, 1)
    used = sum(HEADER.size + len(payload) for payload in part)
    cut = data.draw(st.integers(0, used - 1))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut].ljust(len(whole), b"\0"))
    read = everything(directory)
    assert part[: len(read)] == read
    assert sum(HEADER.size + len(payload) for payload in read) <= cut
    shutil.rmtree(directory)


@given(st.binary(max_size=300))
def test_rubbish_is_no_frame(rubbish: bytes) -> None:
    directory = in_a_directory([[b"x"]])
    segment_path(directory, 1).write_bytes(rubbish)
    assert everything(directory) == [] or frame(everything(directory)[0]) in rubbish
    list(salvage_frames(directory, START))
    shutil.rmtree(directory)


def test_a_segment_longer_than_one_reading(tmp_path: Path) -> None:
    part = [b"%06d" % number + bytes(300) for number in range(SEGMENT_READ_BYTES // 150)]
    lay_out(tmp_path, [part, [b"last"]], size=4 * SEGMENT_READ_BYTES)
    assert everything(tmp_path) == [*part, b"last"]


def test_a_frame_has_a_size() -> None:
    for payload in (b"", bytes(MAX_PAYLOAD + 1)):
        with pytest.raises(ValueError, match="must have 1 to 4096 bytes"):
            frame(payload)
    assert len(frame(bytes(MAX_PAYLOAD))) == MAX_PAYLOAD + HEADER.size


def test_no_segment_is_no_frame(tmp_path: Path) -> None:
    assert everything(tmp_path) == []
    (tmp_path / "00000002.new").touch()
    (tmp_path / "note.log").touch()
    assert segment_numbers(tmp_path) == []


def test_a_segment_owns_its_blocks(tmp_path: Path) -> None:
    os.close(allocate_segment(tmp_path, 1, 100_000))
    status = segment_path(tmp_path, 1).stat()
    assert status.st_size == 100_000
    assert status.st_blocks * 512 >= 100_000
    assert segment_path(tmp_path, 1).read_bytes() == bytes(100_000)


def test_a_segment_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        filler = fill_up(disk)
        with pytest.raises(OSError, match="No space left"):
            allocate_segment(disk, 1, 16_384)
        assert [path.name for path in disk.iterdir()] == ["filler"]
        filler.unlink()
        os.close(allocate_segment(disk, 1, 16_384))
