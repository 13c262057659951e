"""The contestants: how each is started in front of the mock engine. All proxy the same requests."""

import os
import secrets
import subprocess
from abc import ABC, abstractmethod
from importlib import metadata
from pathlib import Path

import peers
import proc

REPOSITORY = peers.BENCH.parent
PROBE = b'{"model":"mock","messages":[{"role":"user","content":"ready?"}],"max_tokens":1}'
CHAT = "/v1/chat/completions"

NGINX_CONFIG = """
worker_processes 1;
{user}
error_log stderr error;
pid {home}/nginx.pid;
worker_rlimit_nofile 20000;
events {{ worker_connections 10000; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  client_max_body_size 64m; client_body_buffer_size 1m;
  client_body_temp_path {home}; proxy_temp_path {home}; fastcgi_temp_path {home};
  uwsgi_temp_path {home}; scgi_temp_path {home};
  upstream engine {{ server 127.0.0.1:{mock_port}; keepalive 2000; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""

LITELLM_CONFIG = """
model_list:
  - model_name: mock
    litellm_params:
      model: openai/mock
      api_base: http://127.0.0.1:{mock_port}/v1
      api_key: none
litellm_settings:
  telemetry: false
  drop_params: false
"""

TIDEMILL_CONFIG = """
[models.mock]
engine = "openai"
base_url = "http://127.0.0.1:{mock_port}/v1"

[prices.mock]
input = "0.004"
cached_input = "0.001"
output = "0.016"
"""


class Contestant(ABC):
    name = ""
    heavy = False  # so slow that the load is made lighter
    worker = ""  # part of the command line of the processes that carry the requests, when they are not all
    ready_limit_s = 30.0

    def __init__(self, say: peers.Say) -> None:
        self.say = say

    @abstractmethod
    def prepare(self) -> str:
        """Installs what is missing; returns the version. Raises Unavailable."""

    @abstractmethod
    def launch(self, home: Path, mock_port: int, port: int) -> proc.Server: ...

    def key(self, home: Path) -> Path | str:
        """The key of requests, or the file that will hold it."""
        return "none"

    def read_key(self, home: Path) -> str:
        key = self.key(home)
        return key if isinstance(key, str) else key.read_text().strip()


class Nginx(Contestant):
    name = "nginx"

    def prepare(self) -> str:
        self._binary = peers.ensure_nginx(self.say)
        return peers.nginx_version(self._binary)

    def launch(self, home: Path, mock_port: int, port: int) -> proc.Server:
        user = "user root;" if os.geteuid() == 0 else ""
        text = NGINX_CONFIG.format(home=home, mock_port=mock_port, port=port, user=user)
        config = home / "nginx.conf"
        config.write_text(text)
        command = [str(self._binary), "-c", str(config), "-p", str(home), "-e", "stderr", "-g", "daemon off;"]
        return proc.Server(command, home / "log")


class RustRouter(Contestant):
    """Round robin: the cheapest of its policies, so that its proxying is compared and not its cache tree."""

    program: tuple[str, ...]

    def prepare(self) -> str:
        self._bin = peers.ensure_environment("peers", self.say)
        return peers.pinned_version(self.name)

    def launch(self, home: Path, mock_port: int, port: int) -> proc.Server:
        first, *rest = self.program
        command = [str(self._bin / first), *rest, "--worker-urls", f"http://127.0.0.1:{mock_port}"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin", "--log-level", "error"]
        command += ["--prometheus-port", str(proc.free_port())]
        return proc.Server(command, home / "log")


class SglangRouter(RustRouter):
    name = "sglang-router"
    program = ("python", "-m", "sglang_router.launch_router")


class VllmRouter(RustRouter):
    name = "vllm-router"
    program = ("vllm-router",)


class AiohttpProxy(Contestant):
    name = "aiohttp"

    def prepare(self) -> str:
        self._bin = peers.ensure_environment("peers", self.say)
        return peers.pinned_version("aiohttp")

    def launch(self, home: Path, mock_port: int, port: int) -> proc.Server:
        command = [str(self._bin / "python"), str(peers.BENCH / "aiohttp_proxy.py")]
        command += ["--port", str(port), "--upstream", f"http://127.0.0.1:{mock_port}"]
        return proc.Server(command, home / "log")


class LiteLLM(Contestant):
    """One worker, no database, one key for all: its lightest form."""

    name = "litellm"
    heavy = True
    ready_limit_s = 120.0

    def __init__(self, say: peers.Say) -> None:
        super().__init__(say)
        self._key = "sk-" + secrets.token_hex(16)  # it refuses to start without one

    def key(self, home: Path) -> Path | str:
        return self._key

    def prepare(self) -> str:
        self._bin = peers.ensure_environment("litellm", self.say)
        return peers.pinned_version("litellm")

    def launch(self, home: Path, mock_port: int, port: int) -> proc.Server:
        config = home / "litellm.yaml"
        config.write_text(LITELLM_CONFIG.format(mock_port=mock_port))
        command = [
            str(self._bin / "litellm"),
            "--config",
            str(config),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        command += ["--num_workers", "1"]
        env = {
            "LITELLM_MASTER_KEY": self._key,
            "REPEATED_STREAMING_CHUNK_LIMIT": "1000000",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
        }
        return proc.Server(command, home / "log", env, cwd=home)


class Tidemill(Contestant):
    """Everything on: key, tenant, balance, hold, durable usage log, ledger. All its processes count."""

    name = "tidemill"
    worker = "tidemill.app.worker"

    def __init__(self, say: peers.Say, extra_args: list[str] | None = None) -> None:
        super().__init__(say)
        self.extra_args = extra_args or []

    def prepare(self) -> str:
        self._command = REPOSITORY / ".venv" / "bin" / "tidemill"
        if not self._command.exists():
            raise peers.Unavailable(f"no {self._command.relative_to(REPOSITORY)}; `make up` or `uv sync` makes it")
        try:
            version = metadata.version("tidemill")
        except metadata.PackageNotFoundError:
            version = "?"
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        return f"{version} {commit.stdout.strip()}".strip()

    def launch(self, home: Path, mock_port: int, port: int) -> proc.Server:
        config = home / "tidemill.toml"
        config.write_text(TIDEMILL_CONFIG.format(mock_port=mock_port))
        command = [str(self._command), "up", "--config", str(config), "--data", str(home / "data")]
        command += ["--port", str(port), "--control-port", str(proc.free_port()), *self.extra_args]
        return proc.Server(command, home / "log", cwd=home)

    def key(self, home: Path) -> Path | str:
        return home / "data" / "first-key"


ALL: dict[str, type[Contestant]] = {
    kind.name: kind for kind in (Nginx, SglangRouter, VllmRouter, AiohttpProxy, LiteLLM, Tidemill)
}
