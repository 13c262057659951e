"""The circuit breaker, with a clock of the test's own."""

from hypothesis import given
from hypothesis import strategies as st

from tidemill.gateway.routing.circuit_breaker import (
    FAILING_AFTER,
    FAILING_BACKOFF_S,
    MAX_BUSY_S,
    MAX_VOTES,
    TRIAL_S,
    UNREACHABLE_AFTER,
    UNREACHABLE_BACKOFF_S,
    CircuitBreaker,
)
from tidemill.tides.routing import ReplicaHealth


def refused(now: float = 0.0) -> CircuitBreaker:
    """One that could not be reached."""
    breaker = CircuitBreaker()
    for _ in range(UNREACHABLE_AFTER):
        breaker.unreachable(now)
    return breaker


def failing(now: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker()
    for _ in range(FAILING_AFTER):
        breaker.failed("a", now)
    return breaker


def test_at_first_all_is_well() -> None:
    assert CircuitBreaker().calm
    assert CircuitBreaker().health(0.0) is ReplicaHealth.READY


def test_what_cannot_be_reached_is_not_used() -> None:
    breaker = CircuitBreaker()
    breaker.unreachable(0.0)
    assert breaker.health(0.0) is ReplicaHealth.READY and not breaker.calm
    breaker.unreachable(0.0)
    assert breaker.health(0.1) is ReplicaHealth.DOWN
    assert breaker.opens_in(0.1) == UNREACHABLE_BACKOFF_S[0] - 0.1


def test_then_one_request_may_try() -> None:
    breaker = refused()
    later = UNREACHABLE_BACKOFF_S[0]
    assert breaker.health(later) is ReplicaHealth.READY
    breaker.begun(later)
    assert breaker.health(later) is ReplicaHealth.DOWN, "one, not a crowd"
    breaker.succeeded("a")
    assert breaker.calm and breaker.health(later) is ReplicaHealth.READY


def test_each_failed_trial_waits_longer_up_to_a_bound() -> None:
    breaker, now = refused(), 0.0
    for wait in (*UNREACHABLE_BACKOFF_S[1:], UNREACHABLE_BACKOFF_S[-1]):
        now += breaker.opens_in(now)
        breaker.begun(now)
        breaker.unreachable(now)
        assert breaker.opens_in(now) == wait


def test_a_trial_whose_client_leaves_is_made_again() -> None:
    breaker = refused()
    breaker.begun(1.0)
    breaker.undecided()
    assert breaker.health(1.0) is ReplicaHealth.READY
    breaker.begun(1.0)
    assert breaker.health(1.0 + TRIAL_S - 0.1) is ReplicaHealth.DOWN
    assert breaker.health(1.0 + TRIAL_S) is ReplicaHealth.READY, "a trial without any end is forgotten"


def test_a_probe_that_gets_through_ends_the_wait() -> None:
    breaker = refused()
    breaker.reached()
    assert breaker.calm


def test_what_fails_is_avoided_but_not_shut() -> None:
    breaker = failing()
    assert breaker.health(0.1) is ReplicaHealth.AVOID
    assert breaker.health(FAILING_BACKOFF_S[0]) is ReplicaHealth.READY
    breaker.begun(FAILING_BACKOFF_S[0])
    breaker.failed("a", FAILING_BACKOFF_S[0])
    assert breaker.opens_in(FAILING_BACKOFF_S[0]) == FAILING_BACKOFF_S[1]
    breaker.succeeded("b")
    assert breaker.calm


def test_a_success_in_between_starts_the_count_anew() -> None:
    breaker = CircuitBreaker()
    for _ in range(10 * FAILING_AFTER):
        breaker.failed("a", 0.0)
        breaker.succeeded("a")
    assert breaker.calm


def test_a_tenant_that_makes_it_fail_has_one_vote() -> None:
    """Others are served all the while; what one tenant does must not close a model to them."""
    breaker = CircuitBreaker()
    breaker.failed("evil", 0.0)
    breaker.succeeded("good")
    for _ in range(100):
        breaker.failed("evil", 0.0)
    assert breaker.health(0.0) is ReplicaHealth.READY
    breaker.failed("good", 0.0)
    assert breaker.health(0.0) is ReplicaHealth.AVOID, "now all say so"


def test_votes_are_bounded() -> None:
    breaker = CircuitBreaker()
    breaker.failed("first", 0.0)
    for index in range(10 * MAX_VOTES):
        breaker.failed(f"t{index}", 0.0) if index % 2 else breaker.succeeded(f"t{index}")
    assert len(breaker._votes) <= MAX_VOTES


def test_a_busy_one_is_left_alone_as_long_as_it_says() -> None:
    breaker = CircuitBreaker()
    breaker.busy(0.0, 3.0)
    assert breaker.health(2.9) is ReplicaHealth.AVOID
    assert breaker.health(3.0) is ReplicaHealth.READY and breaker.calm
    breaker.busy(10.0, 10**9)
    assert breaker.health(10.0 + MAX_BUSY_S) is ReplicaHealth.READY


EVENTS = st.sampled_from(["begun", "succeeded", "undecided", "unreachable", "reached", "failed", "busy"])


@given(st.lists(st.tuples(EVENTS, st.sampled_from("abc"), st.floats(0, 20)), max_size=60))
def test_whatever_happens_it_may_be_tried_again_within_a_bound(events: list[tuple[str, str, float]]) -> None:
    breaker, now = CircuitBreaker(), 0.0
    for what, tenant, wait in events:
        now += wait
        match what:
            case "begun" | "unreachable":
                getattr(breaker, what)(now)
            case "succeeded":
                breaker.succeeded(tenant)
            case "undecided" | "reached":
                getattr(breaker, what)()
            case "failed":
                breaker.failed(tenant, now)
            case "busy":
                breaker.busy(now, None)
        health = breaker.health(now)
        assert health is ReplicaHealth.READY or not breaker.calm
    bound = max(TRIAL_S, MAX_BUSY_S, *FAILING_BACKOFF_S, *UNREACHABLE_BACKOFF_S)
    assert breaker.health(now + bound) is ReplicaHealth.READY
    breaker.succeeded("a")
    breaker.succeeded("b")
    breaker.succeeded("c")
    breaker.health(now + bound)
    assert breaker.calm
