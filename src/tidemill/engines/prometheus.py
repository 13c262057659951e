"""Reading single counters off a Prometheus text page."""


def counter_sum(page: str, name: str) -> int | None:
    """The sum of a counter over all its label sets, or None when it is not on the page."""
    total = None
    for line in page.splitlines():
        if not line.startswith(name):
            continue
        rest = line[len(name) :]
        if rest[:1] not in ("{", " ", "\t"):
            continue
        value = rest[rest.rfind("}") + 1 :].split()
        if not value:
            continue
        try:
            total = (total or 0) + int(float(value[0]))
        except (ValueError, OverflowError):  # NaN and Inf are allowed on the page
            continue
    return total
