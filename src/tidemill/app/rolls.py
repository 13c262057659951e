"""Rolls as the operator asks for them, and what of them outlives the platform: DATA/rolls.json.

A roll holds until the configuration names other weights or another version for the model: then that counts again.
"""

import asyncio
import re
from pathlib import Path

import msgspec
import structlog

from tidemill.app.config.schema.platform import Config
from tidemill.app.datadir import DataDir
from tidemill.app.recipes import weights_of
from tidemill.errors import BadInput, ConfigError, NotFound
from tidemill.fleet.recipe import WeightsVersion
from tidemill.fleet.replicas import ReplicaSet
from tidemill.fleet.roll import Rolls, RollState

FILE = "rolls.json"
_VERSION = re.compile(r"[^\x00-\x1f\x7f]{1,100}")

log = structlog.get_logger()


class RolledModel(msgspec.Struct, frozen=True):
    """What a model was rolled to, and what the configuration said then."""

    to: WeightsVersion
    configured: WeightsVersion


class PlatformRolls:
    """The rolls of this platform."""

    def __init__(self, config: Config, data: DataDir, replicas: ReplicaSet) -> None:
        self._config = config
        self._data = data
        self._replicas = replicas
        self._kept: dict[str, RolledModel] = {}
        self._rolls = Rolls(replicas, self._keep)

    def restore(self) -> None:
        """Have models start with what they were rolled to. Before the fleet is started."""
        try:
            kept = msgspec.json.decode((self._data.path / FILE).read_bytes(), type=dict[str, RolledModel])
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            log.error("what models were rolled to cannot be read; the configuration counts", reason=str(error))
            return
        for model, rolled in kept.items():
            recipe = self._replicas.recipes.get(model)
            if recipe is None or recipe.version != rolled.configured:
                log.warning("the configuration of a model has changed since it was rolled; it counts", model=model)
                continue
            self._kept[model] = rolled
            self._replicas.set_version(model, rolled.to)

    def begin(self, model: str, path: str, version: str) -> RollState:
        """Begin a roll; returns at once.

        Raises NotFound, Conflict, and BadInput for weights that are not there.
        """
        config = self._config.models.get(model)
        if config is None or model not in self._replicas.recipes:
            raise NotFound(
                f"There is no model {model!r} whose engine Tidemill runs.",
                hint=f"Known models: {', '.join(self._replicas.recipes) or 'none'}.",
                param="model",
            )
        if not path or len(path) > 4096 or not path.isprintable():
            raise BadInput("path must be a file, a folder or a name on a hub.", param="path")
        if version and not _VERSION.fullmatch(version):
            raise BadInput("version must be 1 to 100 printable characters.", param="version")
        try:
            weights = weights_of(model, config, path, Path("/"))
        except ConfigError as error:
            raise BadInput(f"path: there is no file {path} on the platform's machine.", param="path") from error
        return self._rolls.begin(model, WeightsVersion(version or Path(path).stem, weights))

    def states(self) -> list[RollState]:
        """The last roll of each model since the platform's start."""
        return self._rolls.states()

    async def close(self) -> None:
        await self._rolls.close()

    async def _keep(self, model: str, version: WeightsVersion) -> None:
        self._kept[model] = RolledModel(version, self._replicas.recipes[model].version)
        text = msgspec.json.format(msgspec.json.encode(self._kept)).decode() + "\n"
        await asyncio.to_thread(self._data.write, FILE, text)
