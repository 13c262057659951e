"""Which platform a command is for: a data directory on this machine, or the address of one elsewhere."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

DEFAULT_DATA = Path("data")


@Parameter(name="*", group="Platform")
@dataclass(frozen=True, kw_only=True)
class Target:
    """The flags that every command has."""

    data: Path | None = None
    """Data directory of the platform. [default: TIDEMILL_DATA, else ./data]"""
    control_url: str | None = None
    """Address of the control plane of a platform elsewhere, whose admin token TIDEMILL_ADMIN_TOKEN holds.
    [default: TIDEMILL_CONTROL_URL]"""
    json: Annotated[bool, Parameter(negative="")] = False
    """Print exactly one JSON document."""

    def remote(self) -> str | None:
        """The address of a platform elsewhere, if it is that which was asked for.

        A flag outdoes the environment.
        """
        if self.control_url or self.data:
            return self.control_url or None
        return os.environ.get("TIDEMILL_CONTROL_URL") or None

    def directory(self) -> Path:
        """The data directory."""
        return self.data or Path(os.environ.get("TIDEMILL_DATA") or DEFAULT_DATA)


HERE = Target()
"""No flags given."""
