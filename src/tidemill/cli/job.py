"""`tidemill job`"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from tidemill.cli.locate import running, source
from tidemill.cli.output import complain, grouped, moment, print_json, print_table, print_text, split_list
from tidemill.cli.target import HERE, Target
from tidemill.errors import BadInput, Conflict, NotFound

app = App(name="job")

_LOOK_EVERY_S = 0.5
OVER = ("succeeded", "failed", "cancelled", "expired")


@app.command
def submit(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    tenant: str,
    devices: int = 1,
    kind: str = "",
    gang: bool = True,
    ranks: str | None = None,
    preemptible: bool = True,
    queue: str | None = None,
    reservation: str | None = None,
    priority: int = 0,
    deadline: str | None = None,
    estimate: str | None = None,
    checkpoint_signal: str = "TERM",
    grace: str | None = None,
    retries: int = 0,
    name: str | None = None,
    env: tuple[str, ...] = (),
    workdir: Path | None = None,
    wait: Annotated[bool, Parameter(negative="")] = False,
    target: Target = HERE,
) -> int:
    """Run a command on devices, as soon as they are available. Put it after `--`.

    Parameters
    ----------
    command
        The command, after `--`. It runs without a shell; for one, write `-- sh -c "..."`.
    tenant
        The tenant's name or id.
    devices
        Number of devices.
    kind
        Kinds of devices, separated by commas, the preferred one first; any kind with a price if left out.
    gang
        Start only when all devices are available; with --no-gang, run on as many as are available.
    ranks
        Start one process per node or per device. [default: node for a gang, else device]
    preemptible
        Allow more urgent work to preempt the job, after a checkpoint signal; costs less.
    queue
        The job queue. [default: the tenant's own]
    reservation
        Run on this reservation of the tenant.
    priority
        Priority within the queue; higher runs first.
    deadline
        When the job must be finished: 6h, 2026-12-01 or 2026-12-01T12:00.
    estimate
        Expected run time on all its devices, such as 2h; used for planning.
    checkpoint_signal
        Signal that asks it to checkpoint: TERM, INT, HUP, QUIT, USR1 or USR2.
    grace
        Time to checkpoint, such as 60s; then it is killed.
    retries
        How many times to retry after a failure.
    name
        Name of the job. [default: the program's name]
    env
        Environment variable, NAME=VALUE; repeat for several.
    workdir
        Working directory on the node. [default: a directory of its own]
    wait
        Wait until the job has finished; exit code 0 only if it succeeded.
    """
    client = running(target)
    made = client.submit_job(
        tenant=tenant,
        command=list(command),
        devices=devices,
        kinds=split_list(kind),
        gang=gang,
        ranks=ranks,
        preemptible=preemptible,
        queue=queue,
        reservation=reservation,
        priority=priority,
        deadline=deadline,
        estimate=estimate,
        checkpoint_signal=checkpoint_signal,
        grace=grace,
        retries=retries,
        name=name,
        env=dict(_variable(each) for each in env),
        workdir=None if workdir is None else str(workdir.absolute()),
    )
    if wait:
        return _wait(target, made["id"])
    if target.json:
        print_json(made)
    else:
        print_text(f"{made['id']} waits in the queue {made['queue']}. Look at it with: tidemill job show {made['id']}")
    return 0


@app.command(name="list")
def list_(
    *,
    tenant: str | None = None,
    state: str | None = None,
    unfinished: Annotated[bool, Parameter(negative="")] = False,
    limit: int = 100,
    target: Target = HERE,
) -> None:
    """List jobs, newest first.

    Parameters
    ----------
    tenant
        Only this tenant's.
    state
        Only in this state: queued, starting, running, preempting, succeeded, failed, cancelled or expired.
    unfinished
        Only those that are not over.
    limit
        At most so many.
    """
    found = source(target).jobs(tenant, state=state, unfinished=unfinished, limit=limit)
    if target.json:
        print_json(found)
        return
    print_table(
        [
            ("Job", "left"),
            ("Name", "left"),
            ("Tenant", "left"),
            ("Queue", "left"),
            ("State", "left"),
            ("Devices", "right"),
            ("Attempts", "right"),
            ("Submitted (UTC)", "left"),
            ("", "left"),
        ],
        [
            (
                job["id"],
                job["name"],
                job["tenant"],
                job["queue"],
                job["state"],
                str(job["devices"]),
                str(job["attempts"]),
                moment(job["submitted_at"]),
                job["reason"],
            )
            for job in found["jobs"]
        ],
    )


@app.command
def show(job: str, /, *, target: Target = HERE) -> None:
    """Show a job, its attempts, and its cost so far.

    Parameters
    ----------
    job
        Its id or name.
    """
    found = source(target).job(job)
    if target.json:
        print_json(found)
        return
    _print_job(found)


@app.command
def logs(
    job: str,
    /,
    *,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative="")] = False,
    attempt: int | None = None,
    rank: int = 0,
    target: Target = HERE,
) -> None:
    """Print the output of a job.

    Parameters
    ----------
    job
        Its id or name.
    follow
        Keep printing until the job has finished, over all attempts.
    attempt
        Number of the attempt, from 1. [default: the last]
    rank
        Number of the process, from 0.
    """
    if target.json and follow:
        raise BadInput("--json and --follow cannot be used together.")
    client = running(target)
    text, cursor, number = "", "", attempt
    while True:
        try:
            piece = client.job_logs(job, number, rank, cursor)
        except NotFound:
            if not follow or client.job(job)["state"] in OVER:
                raise
            time.sleep(_LOOK_EVERY_S)
            continue
        number = piece["attempt"]
        if target.json:
            text += piece["text"]
        else:
            sys.stdout.write(piece["text"])
            sys.stdout.flush()
        at_end = not piece["text"] and piece["next"] == cursor
        cursor = piece["next"]
        if not at_end:
            continue
        if not follow:
            break
        if piece["ended"]:
            now = client.job(job)
            if attempt is not None or now["state"] in OVER:
                break
            if now["attempts"] > number:
                number, cursor = number + 1, ""
                continue
        time.sleep(_LOOK_EVERY_S)
    if target.json:
        print_json({"job": job, "attempt": number, "rank": rank, "text": text})


@app.command
def wait(job: str, /, *, target: Target = HERE) -> int:
    """Wait until a job has finished: exit code 0 if it succeeded, else 1.

    Parameters
    ----------
    job
        Its id or name.
    """
    return _wait(target, job)


@app.command
def cancel(job: str, /, *, target: Target = HERE) -> None:
    """Cancel a job. If it is running, it gets its checkpoint signal and its grace.

    Parameters
    ----------
    job
        Its id or name.
    """
    asked = running(target).cancel_job(job)
    if target.json:
        print_json(asked)
    elif asked["state"] == "cancelled":
        print_text(f"{asked['id']} is cancelled.")
    else:
        print_text(f"{asked['id']} is being stopped; it has {asked['grace_seconds']:g} s.")


@app.command
def artifacts(job: str, path: str | None = None, /, *, to: Path | None = None, target: Target = HERE) -> None:
    """List the artefacts of a job, or download one.

    Parameters
    ----------
    job
        Its id or name.
    path
        Path of the artefact to download, as listed.
    to
        Where to save it. [default: its own name, here]
    """
    client = running(target)
    if path is None:
        found = client.job_artifacts(job)
        if target.json:
            print_json(found)
            return
        print_table(
            [("Artefact", "left"), ("Bytes", "right"), ("Modified (UTC)", "left")],
            [(each["path"], grouped(each["bytes"]), moment(each["modified_at"])) for each in found["artifacts"]],
        )
        return
    file = to or Path(Path(path).name)
    if file.is_dir():
        file /= Path(path).name
    if file.exists():
        raise Conflict(f"{file} already exists.", hint="Choose another name with --to.")
    size = client.download_artifact(job, path, file)
    if target.json:
        print_json({"path": str(file), "bytes": size})
    else:
        print_text(f"{file}: {grouped(size)} bytes")


def _wait(target: Target, job: str) -> int:
    client = running(target)
    while (found := client.job(job))["state"] not in OVER:
        time.sleep(_LOOK_EVERY_S)
    if target.json:
        print_json(found)
    elif found["state"] != "succeeded":
        complain(f"{found['id']}: {found['state']}. {found['reason']}")
    else:
        print_text(f"{found['id']} has succeeded.")
    return 0 if found["state"] == "succeeded" else 1


def _print_job(job: dict[str, Any]) -> None:
    kinds = f" of {', '.join(job['kinds'])}" if job["kinds"] else ""
    how = "preemptible" if job["preemptible"] else "not preemptible"
    lines = [
        f"{job['id']}  {job['name']}  of {job['tenant']}, in the queue {job['queue']}",
        f"  {' '.join(job['command'])}",
        f"  {job['state']}" + (f": {job['reason']}" if job["reason"] else ""),
        f"  {job['devices']} devices{kinds}, {'a gang' if job['gang'] else 'as many as there are'}, {how}",
        f"  submitted {moment(job['submitted_at'])}"
        + (f", ended {moment(job['ended_at'])}" if job["ended_at"] else "")
        + (f", deadline {moment(job['deadline_at'])}" if job["deadline_at"] else "")
        + " UTC",
        f"  {grouped(job['device_seconds'])} device-seconds, {grouped(job['charge'])} {job['currency']}",
        "",
    ]
    print_text("\n".join(lines))
    print_table(
        [
            ("Attempt", "right"),
            ("Devices", "left"),
            ("Started (UTC)", "left"),
            ("Ended", "left"),
            ("Outcome", "left"),
            ("Seconds", "right"),
            (f"Charge {job['currency']}", "right"),
            ("", "left"),
        ],
        [
            (
                str(each["attempt"]),
                ", ".join(each["devices"]),
                moment(each["started_at"]),
                moment(each["ended_at"]),
                each["outcome"] or "runs",
                grouped(each["device_seconds"]),
                grouped(each["charge"]),
                each["reason"] or each["why"],
            )
            for each in job["history"]
        ],
    )


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"--env: {text[:80]!r} is not NAME=VALUE.")
    return name, value
