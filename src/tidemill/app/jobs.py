"""The job controller of this platform, as the configuration has it."""

import os
import pwd
from pathlib import Path

import structlog

from tidemill.app.config.schema.platform import Config
from tidemill.app.datadir import DataDir
from tidemill.errors import ConfigError
from tidemill.fleet.backend import Backend
from tidemill.gateway.endpoints.jobs import JobRules
from tidemill.store.engine import Store
from tidemill.store.job_files import JobFiles
from tidemill.store.job_submission import JobLimits
from tidemill.work.jobs.controller import JobController

log = structlog.get_logger()


def job_files(config: Config, config_dir: Path, data: DataDir) -> JobFiles:
    """Where the files of jobs lie. Raises ConfigError."""
    path = data.path / "jobs" if config.jobs.path is None else config_dir / Path(config.jobs.path).expanduser()
    if config.jobs.user:
        _check_user(config.jobs.user)
    try:
        return JobFiles(path, user=config.jobs.user or None)
    except OSError as error:
        raise ConfigError(f"jobs.path: {path} cannot be used: {error.strerror}.") from error


def _check_user(name: str) -> None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError as error:
        raise ConfigError(f"jobs.user: there is no user {name!r} on this machine.") from error
    if os.geteuid() not in (0, entry.pw_uid):
        raise ConfigError(
            f"jobs.user: only root can run jobs as {name!r}.", hint="Start Tidemill as root, or remove the key."
        )


def job_limits(config: Config, files: JobFiles) -> JobLimits:
    """The rules of jobs."""
    return JobLimits(
        site=files.site,
        tenant_open=config.jobs.tenant_open,
        grace_s=config.jobs.grace_seconds,
        max_grace_s=config.jobs.max_grace_seconds,
    )


def tenant_rules(config: Config, config_dir: Path, data: DataDir) -> JobRules:
    """The rules of jobs for the gateways."""
    files = job_files(config, config_dir, data)
    return JobRules(config.jobs.tenants, str(files.root.resolve()), files.user, job_limits(config, files))


def job_controller(config: Config, store: Store, backend: Backend, files: JobFiles) -> JobController:
    """A job controller that is not open yet."""
    if config.jobs.tenants and not config.jobs.user and os.geteuid() == 0:
        log.warning("jobs of tenants run as root", hint="Name another user in [jobs] user, or run Tidemill as one.")
    return JobController(store, backend, files, zone=config.timezone, keep_s=config.jobs.keep_days * 86_400)
