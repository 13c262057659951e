"""`[jobs]`: commands that tenants have run on devices."""

import msgspec


class JobsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`[jobs]`: commands that tenants have run on devices."""

    tenants: bool = False
    """Tenants may submit jobs with their keys. Their commands run on your machines: see docs/jobs.md, Security."""
    user: str = ""
    """The Unix user that jobs run as; the platform's own when empty."""
    path: str | None = None
    """Where their files lie, relative to the configuration file; DATA/jobs when not set."""
    tenant_open: int = 100
    """Unfinished jobs that a tenant may have."""
    keep_days: float = 30.0
    """How long the files of a job are kept after its end."""
    grace_seconds: float = 60.0
    """What a job gets to checkpoint in when its owner does not say."""
    max_grace_seconds: float = 600.0
    """The most that it can ask for."""
    stop_seconds: float = 60.0
    """The most that a job gets when the platform stops."""
