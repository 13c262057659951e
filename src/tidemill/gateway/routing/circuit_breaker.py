"""The circuit breaker of one replica, fed by the outcomes of requests.

Two kinds of trouble are kept apart. A replica that cannot be *reached* is not used at all until it can be again. One
that *fails* (errors of its own, answers that break off, silence past a limit) is avoided while there is anything
better, and used when there is not; for a tenant can make an engine fail by what it asks, and must not close a model
to others. So each tenant has one vote, its latest outcome, and failing takes a majority of them.
"""

from tidemill.tides.routing import ReplicaHealth

UNREACHABLE_AFTER = 2
"""Connections that fail one after the other."""
UNREACHABLE_BACKOFF_S = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Waits before one request may try again whether it can be reached; each failed trial takes the next."""
FAILING_AFTER = 3
"""Failures at least, since the last time that nobody's latest outcome was one."""
FAILING_BACKOFF_S = (2.0, 4.0, 8.0, 16.0, 30.0)
TRIAL_S = 30.0
"""A trial that has no outcome after this long is forgotten."""
MAX_VOTES = 256
"""Tenants whose latest outcome is remembered."""
STALE_S = 60.0
"""Votes begun longer ago than this are dropped at the next failure."""
BUSY_S = 1.0
"""How long a replica that answered 429 or 503 is left alone when it does not say how long."""
MAX_BUSY_S = 30.0


class CircuitBreaker:
    """The health of a replica, from outcomes of requests. `now` is any one monotonic clock, in seconds.

    `calm` is True while there is nothing to look at: no trouble, no votes. Then a success need not be told.
    """

    __slots__ = (
        "_busy_until",
        "_failures",
        "_hard",
        "_open_until",
        "_opened",
        "_refused",
        "_trial_until",
        "_votes",
        "_votes_at",
    )

    def __init__(self) -> None:
        self._refused = 0
        self._hard = False
        self._failures = 0
        self._votes: dict[str, bool] = {}
        self._votes_at = 0.0
        self._open_until = 0.0
        self._opened = 0
        self._trial_until = 0.0
        self._busy_until = 0.0

    @property
    def calm(self) -> bool:
        return not (self._refused or self._failures or self._open_until or self._busy_until)

    @property
    def is_open(self) -> bool:
        """True if the replica has failed and no request has succeeded since."""
        return bool(self._open_until)

    def health(self, now: float) -> ReplicaHealth:
        """READY, AVOID or DOWN. After its wait, an open breaker lets one trial request through."""
        if self._open_until:
            if now < self._open_until or now < self._trial_until:
                return ReplicaHealth.DOWN if self._hard else ReplicaHealth.AVOID
            return ReplicaHealth.READY
        if self._busy_until:
            if now < self._busy_until:
                return ReplicaHealth.AVOID
            self._busy_until = 0.0
        return ReplicaHealth.READY

    def opens_in(self, now: float) -> float:
        """Seconds until a request may try again; 0 when it may now."""
        return max(self._open_until - now, self._busy_until - now, 0.0)

    def begun(self, now: float) -> None:
        """Note that a request is sent. If the breaker is open, it is the trial."""
        if self._open_until and now >= self._open_until:
            self._trial_until = now + TRIAL_S

    def succeeded(self, tenant: str) -> None:
        """Note an answer, including one that refuses the request for its own fault."""
        self._refused = 0
        if self._open_until:
            self._close()
            self._clear_votes()
        elif self._votes:
            self._vote(tenant, failed=False)
            if True not in self._votes.values():
                self._clear_votes()

    def undecided(self) -> None:
        """Note that the client left before an outcome; a trial is still to be made."""
        self._trial_until = 0.0

    def unreachable(self, now: float) -> None:
        """Note that no connection could be made."""
        self._refused += 1
        if self._refused >= UNREACHABLE_AFTER and not (self._hard and now < self._open_until):
            self._open(now, hard=True)

    def reached(self) -> None:
        """Note that a probe succeeded; the next trial need not wait longer."""
        self._refused = 0
        if self._hard:
            self._close()

    def failed(self, tenant: str, now: float) -> None:
        """Note that the replica failed a request of `tenant` after a connection was made."""
        if now - self._votes_at > STALE_S:
            self._clear_votes()
            self._votes_at = now
        self._failures += 1
        self._vote(tenant, failed=True)
        against = sum(self._votes.values())
        if self._open_until:
            if now >= self._open_until:
                self._open(now, hard=False)
        elif self._failures >= FAILING_AFTER and 2 * against > len(self._votes):
            self._open(now, hard=False)

    def busy(self, now: float, retry_after_s: float | None) -> None:
        """Note that the replica refused a request because it is overloaded."""
        self._refused = 0
        wait = BUSY_S if retry_after_s is None else min(max(retry_after_s, 0.1), MAX_BUSY_S)
        self._busy_until = max(self._busy_until, now + wait)
        if self._open_until and now >= self._open_until:
            self._close()  # it was reached, and it did not fail

    def _open(self, now: float, *, hard: bool) -> None:
        backoff_s = UNREACHABLE_BACKOFF_S if hard else FAILING_BACKOFF_S
        self._open_until = now + backoff_s[min(self._opened, len(backoff_s) - 1)]
        self._opened += 1
        self._hard = hard
        self._trial_until = 0.0

    def _close(self) -> None:
        self._open_until = self._trial_until = 0.0
        self._opened = 0
        self._hard = False

    def _vote(self, tenant: str, *, failed: bool) -> None:
        votes = self._votes
        votes.pop(tenant, None)
        if len(votes) >= MAX_VOTES:
            del votes[next(iter(votes))]
        votes[tenant] = failed

    def _clear_votes(self) -> None:
        self._votes.clear()
        self._failures = 0
