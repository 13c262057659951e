"""A clock that jumps is not believed at once, and one that is set right is."""

from tidemill.clock import BELIEVED_AFTER_S, JumpTolerantClock


class Times:
    def __init__(self) -> None:
        self.wall = 1_000_000.0
        self.steady = 50.0

    def go(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


def test_small_steps_are_followed() -> None:
    times = Times()
    clock = JumpTolerantClock(lambda: times.wall, lambda: times.steady)
    for _ in range(10):
        times.go(60)
        times.wall += 0.5
        assert clock.seconds() == times.wall
    assert clock.now().timestamp() == times.wall


def test_a_jump_is_believed_when_it_stays() -> None:
    for jump in (-7200.0, 7200.0):
        times = Times()
        clock = JumpTolerantClock(lambda t=times: t.wall, lambda t=times: t.steady)  # type: ignore[misc]
        times.wall += jump
        for _ in range(int(BELIEVED_AFTER_S / 60)):
            assert clock.seconds() == times.wall - jump
            times.go(60)
        assert clock.seconds() == times.wall


def test_a_jump_that_goes_back_leaves_nothing() -> None:
    times = Times()
    clock = JumpTolerantClock(lambda: times.wall, lambda: times.steady)
    times.wall += 7200
    clock.seconds()
    times.go(300)
    clock.seconds()
    times.wall -= 7200
    assert clock.seconds() == times.wall
    times.wall += 7200  # another time: the wait begins anew
    times.go(BELIEVED_AFTER_S - 1)
    assert clock.seconds() == times.wall - 7200
