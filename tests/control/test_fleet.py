"""/api/v1/fleet."""

from tests.control.conftest import Api
from tests.control.world import FakePlatform


def test_the_fleet_and_why(api: Api) -> None:
    found = api.get("/fleet")
    assert list(found) == ["nodes", "devices", "replicas", "models", "waiting"]
    (device,) = found["devices"]
    assert (device["device"], device["holder"], device["until"]) == ("n/0", "replica mock/0", None)
    (replica,) = found["replicas"]
    assert replica["devices"] == ["n/0"] and replica["requests"] == 3
    assert api.get("/fleet/why") == {"devices": found["devices"], "waiting": found["waiting"]}
    assert found["waiting"] == [{"work": "job job_1", "why": "2 devices"}]


def test_a_device_is_taken_out_and_put_back(api: Api, platform: FakePlatform) -> None:
    assert api.post("/fleet/drain", name="n/0", why="its fan is loud") == {"name": "n/0", "drained": True}
    (device,) = api.get("/fleet/why")["devices"]
    assert (device["holder"], device["why"]) == ("drained", "its fan is loud")
    assert api.post("/fleet/undrain", name="n/0") == {"name": "n/0", "drained": False}
    assert platform.drained == {}


def test_what_cannot_be_taken_out(api: Api) -> None:
    assert "no node or device" in api.refused(404, "POST", "/fleet/drain", json={"name": "x"})["message"]
    assert "not drained" in api.refused(404, "POST", "/fleet/undrain", json={"name": "n"})["message"]
    for name in ("", "a\nb", "x" * 200):
        assert api.refused(400, "POST", "/fleet/drain", json={"name": name})["param"] == "name"
    api.refused(400, "POST", "/fleet/drain", json={"name": "n", "reason": "x"})
