"""Settings of the planner. All times in seconds."""

import msgspec


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The planner's settings that an operator may change.

    The defaults are those of the simulated fleet (docs/tides.md).
    """

    # How many replicas
    target: float = 0.75
    """Share of a replica's measured capacity that is planned with: the rest is for what comes in bursts."""
    keep_target: float = 0.65
    """A replica is given up only when the others would be used less than this."""
    wake_share: float = 0.05
    """A model at zero is woken ahead of the first request when so much of one replica's work is expected."""
    wait_settle_s: float = 5.0
    """After a replica became ready, requests that wait ask for no further one for so long: they are on their way."""
    late_settle_s: float = 120.0
    """After a replica became ready, missed objectives ask for no further one until they have had time to get fewer."""
    late_load: float = 0.4
    """Missed objectives ask for a replica only where the others are used that much: what is late on idle replicas is
    late for another reason."""
    lend_replicas: bool = True
    """Replicas are lent to batches and taken back (`LendReplica`), where the shell can do that."""

    # Preemption
    min_run_s: float = 1800.0
    """A job that began less than this ago is not preempted by an equal."""
    min_fill_s: float = 300.0
    """A replica for batches that began less than this ago is not preempted by a job."""
    soon_s: float = 10.0
    """A job that ends within this is waited for, not preempted."""
    restart_s: float = 60.0
    """What a preemption costs a job beside unsaved work: to checkpoint, and to get back to where it was."""

    # Deadlines
    urgent_s: float = 1800.0
    urgent_share: float = 0.67
    """A deadline is urgent when the slack to it is less than `urgent_s` and this share of what is left to run."""
    hopeless_share: float = 0.1
    """A deadline that is missed by more than this share of what is left to run is urgent no longer."""
    batch_margin: float = 0.6
    """Share of the time to its deadline in which a batch is meant to be done."""
    ageing_s: float = 3600.0
    """For each so much waited, a job counts as one higher in priority among those of its queue."""

    # Reservations
    margin_s: float = 15.0
    """Devices of a reservation are called back this long before the grace time of who holds them would be over."""
    ahead_s: float = 120.0
    """From so long before its start, what is free is kept for a reservation."""

    # Backfill
    batch_gain: float = 1.0
    """Work that a replica does when it serves nothing but batches, relative to its capacity within the objective."""
    batch_inside: float = 0.5
    """Share of a replica's unused capacity that filler requests inside it are counted to use."""
    batch_keep: float = 1.3
    """A replica that is there for batches is counted as needed up to so many times the rate that deadlines ask for."""
    batch_worth: float = 3.0
    """A replica is started for batches if they keep it busy for so many times its start-up."""
    preemption_searches: int = 256
    """Pieces of waiting work for which one plan searches for preemptions, the first in the queue."""


RULES = Rules()
