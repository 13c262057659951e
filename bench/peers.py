"""Brings the peers to the machine: their own virtual environments, and nginx, all below bench/.cache/.

Nothing of the system is changed: nginx is used if it is there, else Debian's package is unpacked
(not installed) into the cache, so that no service starts.
"""

import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

BENCH = Path(__file__).resolve().parent
CACHE = BENCH / ".cache"
INSTALL_LIMIT_S = 600
Say = Callable[[str], None]


class Unavailable(Exception):
    """A peer that can't be had on this machine; the text says why."""


def requirements(environment: str) -> list[str]:
    """The pinned lines of peers.txt under `# environment: NAME`."""
    found: list[str] = []
    current = ""
    for line in (BENCH / "peers.txt").read_text().splitlines():
        heading = re.match(r"# environment: (\S+)", line)
        if heading:
            current = heading[1]
        elif current == environment and line and not line.startswith("#"):
            found.append(line)
    return found


def pinned_version(name: str) -> str:
    for line in (BENCH / "peers.txt").read_text().splitlines():
        if re.match(rf"{re.escape(name)}(\[|==)", line):
            return line.partition("==")[2]
    return "?"


def ensure_environment(name: str, say: Say) -> Path:
    """The `bin` directory of a virtual environment with the pinned peers, made when absent or out of date."""
    home = CACHE / name
    stamp = home / "installed.txt"
    wanted = "\n".join(requirements(name))
    if not stamp.exists() or stamp.read_text() != wanted:
        say(f"installing {wanted.replace(chr(10), ', ')} into bench/.cache/{name} (once)")
        try:
            if not (home / "bin" / "python").exists():
                venv.create(home, with_pip=True)
            command = [str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
            _run([*command, *requirements(name)])
        except (OSError, subprocess.SubprocessError) as wrong:
            raise Unavailable(f"can't install {wanted!r}: {_reason(wrong)}") from wrong
        stamp.write_text(wanted)
    return home / "bin"


def ensure_nginx(say: Say) -> Path:
    """The nginx binary: the system's, or Debian's package unpacked into the cache."""
    found = shutil.which("nginx", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if found:
        return Path(found)
    home = CACHE / "nginx"
    binary = home / "usr" / "sbin" / "nginx"
    if not binary.exists():
        say("nginx is absent: unpacking Debian's package into bench/.cache/nginx (nothing is installed)")
        home.mkdir(parents=True, exist_ok=True)
        try:
            try:
                _run(["apt-get", "download", "nginx"], cwd=home)
            except subprocess.SubprocessError:  # no package lists yet; getting them needs root
                _run(["apt-get", "update"])
                _run(["apt-get", "download", "nginx"], cwd=home)
            package = next(home.glob("nginx_*.deb"))
            _run(["dpkg-deb", "-x", str(package), str(home)])
        except (OSError, subprocess.SubprocessError, StopIteration) as wrong:
            raise Unavailable(f"nginx: can't get Debian's package: {_reason(wrong)}") from wrong
    try:
        _run([str(binary), "-v"])
    except (OSError, subprocess.SubprocessError) as wrong:
        raise Unavailable(f"nginx: the unpacked binary doesn't run here: {_reason(wrong)}") from wrong
    return binary


def nginx_version(binary: Path) -> str:
    told = subprocess.run([str(binary), "-v"], capture_output=True, text=True, check=False, timeout=10)
    return told.stderr.strip().rpartition("/")[2]


def _run(command: list[str], cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)


def _reason(wrong: BaseException) -> str:
    if isinstance(wrong, subprocess.CalledProcessError):
        lines = (wrong.stderr or wrong.stdout or "").strip().splitlines()
        return lines[-1] if lines else f"exit status {wrong.returncode}"
    return str(wrong)


def main() -> None:
    """`python bench/peers.py [--litellm]` installs the peers now."""
    environments = ["peers", "litellm"] if "--litellm" in sys.argv else ["peers"]
    try:
        print(ensure_nginx(print))
        for name in environments:
            print(ensure_environment(name, print))
    except Unavailable as wrong:
        sys.exit(str(wrong))


if __name__ == "__main__":
    main()
