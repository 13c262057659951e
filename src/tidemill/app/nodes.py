"""The devices of this machine as the configuration has them: declared in `[nodes.local]`, else found."""

from tidemill.app.config.schema.platform import Config
from tidemill.fleet.backend import Device
from tidemill.fleet.device_kinds import check_kind, kind_of, memory_of
from tidemill.fleet.devices import DeclaredDevices, declared, discover
from tidemill.fleet.local import NODE


def find_devices(config: Config) -> tuple[Device, ...]:
    """The devices that replicas and jobs may hold here. Runs the vendors' tools; not for the event loop.

    Raises ConfigError when a model asks for a kind of device that nobody knows.
    """
    node = config.nodes.get(NODE)
    if node is not None and node.devices:
        key = f"nodes.{NODE}.devices"
        entries = [DeclaredDevices(check_kind(key, each.kind), each.count, each.memory_gib) for each in node.devices]
        devices = declared(NODE, entries, {entry.kind: memory_of(entry.kind) for entry in entries})
    else:
        devices = discover(NODE, kind_of)
    present = {device.kind for device in devices}
    for name, model in config.models.items():
        for kind in model.kinds:
            check_kind(f"models.{name}.kinds", kind, present)
    return devices
