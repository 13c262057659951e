"""The last step before a job's command.

A clean environment, another user if there shall be one, then exec.

    python -I -S job_exec.py '{"argv": ["python", "train.py"], "user": null}'

The environment of the platform may hold what is none of a job's business (tokens of upstreams, passwords of databases,
keys of clouds). So a job gets what it was given, what a program needs on any machine, and what says how the machine's
accelerators are to be used. Nothing else.

What it was given comes under names that begin with TIDEMILL_GIVEN_, and gets its own names only here, once this process
is the job's user: LD_PRELOAD, say, would otherwise do its work in a process that still has the platform's rights.

Only the standard library: this file runs by itself, also where nothing of Tidemill can be imported.
"""

import ctypes
import json
import os
import pwd
import signal
import sys
import warnings  # noqa: F401  os.execvpe wants it, and the job's user may not be able to read Python's library

INHERITED = frozenset(
    "PATH HOME LANG LANGUAGE TZ TMPDIR LD_LIBRARY_PATH SSL_CERT_FILE SSL_CERT_DIR MASTER_ADDR MASTER_PORT".split()
)
"""Variables that a job inherits from the node."""
PREFIXES = (
    ("TIDEMILL_", "LC_", "OMP_", "MKL_", "OPENBLAS_")
    + ("CUDA_", "NVIDIA_", "NCCL_", "HIP_", "ROCR_", "ROCM_", "RCCL_", "GLOO_", "UCX_", "FI_", "IBV_", "MLX5_")
    + ("ASCEND_", "HCCL_", "XPU_", "BKCL_", "MUSA_", "MCCL_", "HSA_")
)  # fmt: skip
"""Beginnings of the names of others."""
GIVEN = "TIDEMILL_GIVEN_"
"""How the names of variables begin that a job was given."""
PR_SET_PDEATHSIG = 1
EXIT_CANNOT = 127


def clean(environment: dict[str, str]) -> dict[str, str]:
    """What of `environment` a job gets, and what it was given."""
    kept = {
        name: value
        for name, value in environment.items()
        if name in INHERITED or (name.startswith(PREFIXES) and not name.startswith(GIVEN))
    }
    given = {name.removeprefix(GIVEN): value for name, value in environment.items() if name.startswith(GIVEN)}
    return {**kept, **given}


def become(user: str) -> None:
    """Be another user from here on, for good. Raises OSError, KeyError."""
    entry = pwd.getpwnam(user)
    if os.geteuid() == entry.pw_uid and os.getuid() == entry.pw_uid:
        return
    os.initgroups(entry.pw_name, entry.pw_gid)
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)


def main(arguments: list[str]) -> int:
    order = json.loads(arguments[0])
    argv: list[str] = order["argv"]
    environment = clean(dict(os.environ))
    parent = os.getppid()
    try:
        if order["user"]:
            become(order["user"])
            environment |= {"USER": order["user"], "LOGNAME": order["user"]}
            # The kernel forgets the wish to die with the shim when the user changes.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                return EXIT_CANNOT
        os.execvpe(argv[0], argv, environment)
    except KeyError:
        complain(f"there is no user {order['user']!r} on this node")
    except FileNotFoundError:
        complain(f"there is no program {argv[0]!r}")
    except OSError as error:
        complain(f"{argv[0]!r} cannot be started: {error.strerror}")
    return EXIT_CANNOT


def complain(text: str) -> None:
    """Say in the job's log why its command was not started."""
    os.write(2, f"tidemill: {text}\n".encode(errors="backslashreplace"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
