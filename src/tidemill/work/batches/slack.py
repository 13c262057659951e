"""How much filler work may run now. The batch runner asks, and knows nothing of the reasons."""

from typing import Protocol


class Slack(Protocol):
    """Admission of filler work."""

    def slots(self, model: str) -> int:
        """How many lines of batches may be in flight at a model now, in all.

        May change from one moment to the next.
        """
        ...


class ConfiguredSlack:
    """A configured number for each model, and none while an interactive request waits for it."""

    def __init__(self) -> None:
        self.parallel: dict[str, int] = {}
        """By model."""
        self.waiting: dict[str, int] = {}
        """Interactive requests that wait, by model."""

    def slots(self, model: str) -> int:
        if self.waiting.get(model, 0) > 0:
            return 0
        return self.parallel.get(model, 1)  # a model that is gone: its lines shall fail, not wait


class TideSlack(ConfiguredSlack):
    """As many as the tide says, for the models that it says something of (`app.tide`).

    Else the configured number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allowed: dict[str, int] = {}
        """By model."""

    def slots(self, model: str) -> int:
        allowed = self.allowed.get(model)
        return super().slots(model) if allowed is None else allowed
