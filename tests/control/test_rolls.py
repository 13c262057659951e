"""/api/v1/models/roll: what is asked of the platform, and how its answer is told."""

from tests.control.conftest import Api
from tests.control.world import FakePlatform
from tidemill.errors import Conflict


def test_a_roll_is_begun_and_shown(api: Api, platform: FakePlatform) -> None:
    assert api.get("/models/roll") == {"rolls": []}
    answer = api.client.post("/api/v1/models/roll", json={"model": "big", "path": "/w/new.gguf", "version": "2"})
    assert answer.status_code == 202
    begun = answer.json()
    assert begun == {
        "model": "big",
        "version": "2",
        "path": "/w/new.gguf",
        "before": "old.gguf",
        "state": "rolling",
        "done": 0,
        "of": 2,
        "why": "",
        "began_at": "1970-01-01T00:00:01+00:00",
        "ended_at": None,
    }
    assert platform.rolled is not None
    platform.rolled.state, platform.rolled.ended_at, platform.rolled.why = "taken back", 61.5, "no such tensor"
    (shown,) = api.get("/models/roll")["rolls"]
    assert shown == {
        **begun,
        "state": "taken back",
        "why": "no such tensor",
        "ended_at": "1970-01-01T00:01:01.500000+00:00",
    }


def test_what_cannot_be_rolled_is_told(api: Api, platform: FakePlatform) -> None:
    assert api.refused(400, "POST", "/models/roll", json={"model": "big"})["param"] == "path"
    api.refused(400, "POST", "/models/roll", json={"model": "big", "path": "x", "paht": "y"})

    def refuse(model: str, path: str, version: str) -> None:
        raise Conflict("big is being rolled already.")

    platform.roll = refuse  # type: ignore[method-assign, assignment]
    assert api.refused(409, "POST", "/models/roll", json={"model": "big", "path": "x"})["code"] == "conflict"
