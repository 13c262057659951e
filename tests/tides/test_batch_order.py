"""The order of the lines of batches."""

from hypothesis import given
from hypothesis import strategies as st

from tidemill.tides.batch_order import BatchLineView, order

NOW = 1000.0
lines = st.lists(
    st.builds(
        BatchLineView,
        work=st.floats(1, 1000),
        deadline=st.floats(NOW, NOW + 100),
        prefix=st.sampled_from(["", "a", "b", "c"]),
    ),
    max_size=40,
)


def in_time(ordered: list[int], of: list[BatchLineView], rate: float) -> bool:
    at = NOW
    for index in ordered:
        at += of[index].work / rate
        if at > of[index].deadline + 1e-6:
            return False
    return True


@given(lines, st.floats(1, 1000))
def test_each_line_has_its_place(of: list[BatchLineView], rate: float) -> None:
    assert sorted(order(of, NOW, rate)) == list(range(len(of)))
    assert order(of, NOW, rate) == order(of, NOW, rate)


@given(lines, st.floats(1, 1000))
def test_deadlines_hold_where_the_earliest_first_would_hold_them(of: list[BatchLineView], rate: float) -> None:
    earliest_first = sorted(range(len(of)), key=lambda index: of[index].deadline)
    if in_time(earliest_first, of, rate):
        assert in_time(order(of, NOW, rate), of, rate)


def test_with_time_left_lines_that_begin_alike_come_together() -> None:
    of = [BatchLineView(10, NOW + 1000 + index, "ab"[index % 2]) for index in range(10)]
    assert "".join(of[index].prefix for index in order(of, NOW, 100)) == "aaaaabbbbb"


def test_without_time_left_the_earliest_deadline_goes_first() -> None:
    of = [BatchLineView(100, NOW + 10 * index, "ab"[index % 2]) for index in (3, 1, 2)]
    assert order(of, NOW, 10) == [1, 2, 0]


def test_lines_of_one_batch_come_together_by_prefix_even_in_a_hurry() -> None:
    of = [BatchLineView(100, NOW + 5, "ab"[index % 2]) for index in range(6)]
    assert "".join(of[index].prefix for index in order(of, NOW, 1)) == "aaabbb"
