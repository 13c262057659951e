"""The batch runner's keeper: what it tells the runner of models and of who waits."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.plane import model
from tidemill.app.batch_worker import RunnerCommand, RunnerModel
from tidemill.app.batches import BatchProcess
from tidemill.app.config.schema.models import ModelConfig
from tidemill.app.config.schema.platform import Config
from tidemill.app.datadir import DataDir
from tidemill.gateway.routing.replica import ReplicaSpec


class Kept:
    def __init__(self, tmp_path: Path, **changes: Any) -> None:
        self.said: list[RunnerCommand] = []
        self.specs = [model(1, "mock", **changes)]
        config = Config(models={"mock": ModelConfig(engine="openai", base_url="http://127.0.0.1:1/v1")})
        self.process = BatchProcess(
            config,
            tmp_path,
            DataDir(tmp_path),
            gateway_url="http://127.0.0.1:1",
            store_url="sqlite://",
            token="t",
            specs=lambda: self.specs,
        )
        self.process._tell = self.said.append  # type: ignore[method-assign,assignment]


TWO = tuple(ReplicaSpec(f"mock/{index}", "http://127.0.0.1:1/v1", ready=True) for index in range(2))


@pytest.mark.parametrize(
    ("changes", "parallel"),
    [({}, 8), ({"slots": 8, "replicas": TWO}, 8), ({"slots": 1}, 1)],
)
def test_half_of_the_slots_are_for_batches(tmp_path: Path, changes: Any, parallel: int) -> None:
    kept = Kept(tmp_path, aliases=("other",), **changes)
    kept.process.announce_models()
    assert kept.said == [RunnerCommand(do="models", models=[RunnerModel("mock", ("other",), parallel)])]


def test_who_waits_at_the_gateway_or_at_the_engine(tmp_path: Path) -> None:
    kept = Kept(tmp_path, slots=4, replicas=TWO)
    for active, queued, waiting in ((8, 0, 0), (9, 0, 1), (11, 2, 5), (11, 2, 5), (3, 0, 0)):
        kept.process.note_load({"mock": active, "gone": 50}, {"mock": queued, "gone": 7})
        assert kept.process._waiting == ({"mock": waiting} if waiting else {})
    assert [command.waiting for command in kept.said] == [{"mock": 1}, {"mock": 5}, {}]
    kept.specs[0] = msgspec.structs.replace(kept.specs[0], slots=None)
    kept.process.note_load({"mock": 5000}, {})
    assert len(kept.said) == 3
