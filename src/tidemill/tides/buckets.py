"""Times counted in logarithmic buckets, eight to a doubling.

A quantile is right to a tenth, whatever the times are.

A few dozen integers hold any number of samples, they add up, and they age by being thrown away.
"""

from collections.abc import Mapping

Buckets = dict[int, int]
"""How many samples are in each bucket (`bucket_of`)."""

_SUB_BITS = 3


def bucket_of(micros: int) -> int:
    """The bucket of a time: eight to a doubling."""
    micros = max(micros, 1)
    shift = max(micros.bit_length() - _SUB_BITS - 1, 0)
    return (shift << _SUB_BITS) + (micros >> shift)


def edge_of(bucket: int) -> int:
    """The lowest time of a bucket, microseconds."""
    if bucket < 2 << _SUB_BITS:
        return bucket
    shift = (bucket >> _SUB_BITS) - 1
    return ((bucket & 7) + 8) << shift


def quantile_us(buckets: Mapping[int, int], quantile: float) -> float | None:
    """The quantile of the samples, microseconds; None without samples."""
    total = sum(buckets.values())
    if not total:
        return None
    rank, seen = quantile * total, 0
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        if seen >= rank:
            return (edge_of(bucket) + edge_of(bucket + 1)) / 2
    raise AssertionError("the samples add up")


def add_up(into: Buckets, more: Mapping[int, int]) -> None:
    """Add bucket counts to others."""
    for bucket, count in more.items():
        into[bucket] = into.get(bucket, 0) + count
