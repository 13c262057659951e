"""The routing score, with plain values."""

from hypothesis import assume, given
from hypothesis import strategies as st

from tidemill.tides.routing import (
    POLICY,
    ReplicaCandidate,
    ReplicaHealth,
    RoutingPolicy,
    arm,
    choose,
    cost,
    home,
    mixed,
    work_of,
)

tokens = st.integers(0, 200_000)
keys = st.integers(0, 2**64 - 1)
views = st.builds(
    ReplicaCandidate,
    health=st.sampled_from(ReplicaHealth),
    cached=tokens,
    in_flight=tokens,
    held=st.integers(0, 1000),
    home=st.just(False),
)
crowds = st.lists(views, min_size=1, max_size=8)
worsts = st.sampled_from([ReplicaHealth.READY, ReplicaHealth.FULL, ReplicaHealth.AVOID])


def test_a_long_prompt_goes_where_its_prefix_is() -> None:
    assert choose([ReplicaCandidate(in_flight=0), ReplicaCandidate(cached=9_000, in_flight=2_000)], 10_000) == 1


def test_a_crowd_with_one_prefix_spreads() -> None:
    assert choose([ReplicaCandidate(in_flight=0), ReplicaCandidate(cached=9_000, in_flight=20_000)], 10_000) == 0


def test_a_prompt_that_nobody_knows_goes_to_the_least_loaded() -> None:
    assert (
        choose([ReplicaCandidate(in_flight=500), ReplicaCandidate(in_flight=100), ReplicaCandidate(in_flight=300)], 50)
        == 1
    )


def test_of_equals_the_emptier_cache_takes_it() -> None:
    assert choose([ReplicaCandidate(held=9), ReplicaCandidate(held=3), ReplicaCandidate(held=3)], 50) == 1


def test_a_session_stays_at_home_until_that_is_much_busier() -> None:
    crowd = [ReplicaCandidate(), ReplicaCandidate(home=True, in_flight=POLICY.session_tokens)]
    assert choose(crowd, 100) == 1
    crowd[1] = ReplicaCandidate(home=True, in_flight=4 * POLICY.session_tokens)
    assert choose(crowd, 100) == 0


def test_standing_goes_before_everything() -> None:
    crowd = [
        ReplicaCandidate(ReplicaHealth.AVOID, cached=1000),
        ReplicaCandidate(ReplicaHealth.FULL),
        ReplicaCandidate(in_flight=10**6),
    ]
    assert choose(crowd, 1000) == 2
    assert choose(crowd[:2], 1000) == 1
    assert choose(crowd[:1], 1000) == 0
    assert choose(crowd[:1], 1000, worst=ReplicaHealth.FULL) is None
    assert choose([], 1000) is None


@given(crowds, tokens, worsts)
def test_the_choice_is_allowed_and_nothing_is_better(
    crowd: list[ReplicaCandidate], prompt: int, worst: ReplicaHealth
) -> None:
    chosen = choose(crowd, prompt, worst=worst)
    allowed = [view for view in crowd if view.health <= worst]
    if chosen is None:
        assert not allowed
        return
    best = crowd[chosen]
    assert best.health == min(view.health for view in allowed)
    peers = [view for view in allowed if view.health == best.health]
    assert cost(best, prompt) == min(cost(view, prompt) for view in peers)


@given(crowds, tokens)
def test_more_load_or_less_cache_elsewhere_does_not_change_the_choice(
    crowd: list[ReplicaCandidate], prompt: int
) -> None:
    chosen = choose(crowd, prompt)
    assume(chosen is not None)
    worse = [
        view
        if index == chosen
        else ReplicaCandidate(view.health, view.cached // 2, view.in_flight + 1000, view.held, view.home)
        for index, view in enumerate(crowd)
    ]
    assert choose(worse, prompt) == chosen


@given(crowds, tokens, st.randoms(use_true_random=False))
def test_the_order_of_the_replicas_does_not_matter(
    crowd: list[ReplicaCandidate], prompt: int, chance: "object"
) -> None:
    chosen = choose(crowd, prompt)
    assume(chosen is not None)
    assert chosen is not None
    shuffled = list(crowd)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    again = choose(shuffled, prompt)
    assert again is not None
    assert (shuffled[again].health, cost(shuffled[again], prompt)) == (
        crowd[chosen].health,
        cost(crowd[chosen], prompt),
    )


@given(tokens, tokens, st.integers(1, 10_000), st.integers(1, 8))
def test_work_is_what_is_not_cached_and_what_may_come(prompt: int, cached: int, bound: int, choices: int) -> None:
    work = work_of(prompt, cached, bound, choices)
    assert work.prefill == max(prompt - cached, 0)
    assert 0 < work.decode <= POLICY.expected_output * POLICY.decode_weight * choices
    assert work_of(prompt, cached, bound, choices, RoutingPolicy(decode_weight=0)).decode == 0


@given(keys, st.lists(keys, min_size=1, max_size=12, unique=True))
def test_a_home_does_not_depend_on_the_others(session: int, seats: list[int]) -> None:
    """Taking another replica away moves nobody."""
    at = home(session, seats)
    for gone in range(len(seats)):
        if gone != at:
            left = seats[:gone] + seats[gone + 1 :]
            assert left[home(session, left)] == seats[at]


def test_homes_are_spread_evenly() -> None:
    seats = [mixed(index, 77) for index in range(4)]
    counts = [0] * 4
    for session in range(4000):
        counts[home(mixed(session, 5), seats)] += 1
    assert all(850 < count < 1150 for count in counts), counts


def test_a_split_is_within_its_shares() -> None:
    split = [("v2", 10.0), ("v3", 0.5)]
    got = [arm(mixed(key, 3), split) for key in range(100_000)]
    assert abs(got.count("v2") / 1000 - 10.0) < 0.4
    assert abs(got.count("v3") / 1000 - 0.5) < 0.1
    assert arm(0, [("all", 100.0)]) == arm(2**64 - 1, [("all", 100.0)]) == "all"
    assert arm(5, []) is None


@given(keys, st.floats(0.1, 50), st.floats(0, 49))
def test_a_growing_share_takes_nobody_out(key: int, share: float, more: float) -> None:
    if arm(key, [("v2", share)]) == "v2":
        assert arm(key, [("v2", share + more)]) == "v2"
