"""`tidemill up`: run the platform in the foreground."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def up(
    *,
    config: Annotated[Path | None, Parameter(help="Configuration file (TOML). [default: built-in defaults]")] = None,
    data: Annotated[Path, Parameter(help="The data directory.", env_var="TIDEMILL_DATA")] = Path("data"),
    port: Annotated[int, Parameter(help="Port of the data plane, where tenants send requests.")] = 8080,
    control_port: Annotated[int, Parameter(help="Port of the control plane.")] = 8081,
    workers: Annotated[int, Parameter(help="Number of gateway processes.")] = 1,
) -> None:
    """Run the platform in the foreground: the gateway, the engines, the store and the control plane.

    Ctrl-C or SIGTERM drains: open requests finish, nothing metered is lost.
    """
    from rich.console import Console
    from rich.markup import escape

    from tidemill.app.config.load import load_config
    from tidemill.app.logs import configure_logs
    from tidemill.app.supervisor import Supervisor
    from tidemill.control.api import create_app

    console = Console(highlight=False, soft_wrap=True)
    loaded = load_config(config)
    configure_logs()

    def progress(text: str) -> None:
        console.print(f"[dim]·[/dim] {escape(text)}")

    async def run() -> bool:
        supervisor = Supervisor(
            loaded,
            config_dir=config.parent if config is not None else Path(),
            data_dir=data,
            port=port,
            control_port=control_port,
            workers=workers,
            control_app=create_app,
            progress=progress,
        )
        return await supervisor.run(lambda platform: welcome(platform, console))

    console.print(f"[bold]Tidemill[/bold] starts on {data}")
    finished = asyncio.run(run())
    console.print("stopped" if finished else "stopped; some requests were cut off, and are billed as far as they came")
    sys.stdout.flush()


def welcome(platform: object, console: object) -> None:
    """Say that the platform is ready: its two addresses, the first key, and a line to paste."""
    from rich.console import Console
    from rich.markup import escape

    from tidemill.app.supervisor import Supervisor

    assert isinstance(platform, Supervisor) and isinstance(console, Console)
    first = platform.first_tenant
    key_file = platform.data.path / "first-key"
    model = next(iter(platform.config.models), None)
    console.print()
    console.print("[bold green]Tidemill is ready.[/bold green]")
    console.print(f"  API (OpenAI)    {platform.url}")
    console.print(
        f"  control plane   {platform.control_url}   (token in {escape(str(platform.data.path / 'admin-token'))})"
    )
    if first is not None:
        console.print(f"  first key       [bold]{first.key}[/bold]   tenant {escape(first.name)}")
        console.print(f"                  shown this once; also in {escape(str(key_file))}")
    elif key_file.exists():
        console.print(f"  first key       in {escape(str(key_file))}")
    if model is not None and key_file.exists():
        console.print("\nTry it from another terminal:\n")
        console.print(escape(curl_line(platform.url, key_file, model)))
    console.print()


def curl_line(url: str, key_file: Path, model: str) -> str:
    """A request that works when pasted."""
    body = (
        f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is a tide mill?"}}], "max_tokens": 64}}'
    )
    return (
        f'curl {url}/chat/completions -H "Authorization: Bearer $(cat {key_file.resolve()})"'
        f" -H 'Content-Type: application/json' -d '{body}'"
    )
