"""/api/v1/models/roll: another version of a model's weights, replica by replica."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from litestar import get, post
from litestar.params import JSONBody
from msgspec import Meta

from tidemill.control.api.access import Running
from tidemill.control.api.schemas import CONFLICT, FAILURES, Answer, Body, Instant
from tidemill.fleet.roll import RollState


class Roll(Answer):
    """How a roll stands."""

    model: str
    version: str
    path: Annotated[str, Meta(description="The weights that it is rolled to.")]
    before: Annotated[str, Meta(description="The version that it ran before.")]
    state: Literal["rolling", "done", "taking back", "taken back", "failed"]
    done: Annotated[int, Meta(description="Replicas that run the new version.")]
    of: Annotated[int, Meta(description="Replicas to be replaced.")]
    why: Annotated[str, Meta(description="Why it was taken back.")]
    began_at: Instant
    ended_at: Instant | None


class RollList(Answer):
    """Rolls."""

    rolls: list[Roll]


class RollRequest(Body):
    """What to roll to."""

    model: str
    path: Annotated[
        str,
        Meta(description="On the platform's machine: a GGUF file for llamacpp, else a folder or a name on a hub."),
    ]
    version: Annotated[str, Meta(description="What it is called; its file's name when left out.")] = ""


@post("/models/roll", status_code=202, responses=CONFLICT)
async def roll_model(platform: Running, data: JSONBody[RollRequest]) -> Roll:
    """Roll a model to other weights. Answers at once; `GET` shows how it goes."""
    return _roll(platform.roll(data.model, data.path, data.version))


@get("/models/roll", responses=FAILURES)
async def list_rolls(platform: Running) -> RollList:
    """The last roll of each model since the platform's start."""
    return RollList(rolls=[_roll(each) for each in platform.rolls()])


def _roll(state: RollState) -> Roll:
    return Roll(
        model=state.model,
        version=state.version.name,
        path=state.version.path,
        before=state.before.name or state.before.path,
        state=state.state,
        done=state.done,
        of=state.of,
        why=state.why,
        began_at=_instant(state.began_at),
        ended_at=None if state.ended_at is None else _instant(state.ended_at),
    )


def _instant(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()
