"""The command line as such: help, usage errors, exit codes, and no traceback ever."""

import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.cli.conftest import Run, Up
from tidemill import __version__
from tidemill.cli import main, output

COMMANDS = [
    "tenant create", "tenant list", "key create", "key list", "key revoke", "credit grant", "usage", "invoice",
    "model list", "meter reconcile", "ledger check",
]  # fmt: skip


def test_help_is_quick_and_names_every_command() -> None:
    script = (
        "import sys, tidemill.cli; code = tidemill.cli.main(['--help'])\n"
        "heavy = {'sqlalchemy', 'alembic', 'litestar', 'http.client', 'msgspec'} & set(sys.modules)\n"
        "sys.exit(f'{heavy}' if heavy else code)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    for command in ("up", "demo", *(command.split()[0] for command in COMMANDS)):
        assert f" {command} " in found.stdout


def test_talking_to_a_running_platform_does_not_load_the_database() -> None:
    script = (
        "import sys, tidemill.cli; tidemill.cli.main(['tenant', 'list', '--data', '/nonexistent'])\n"
        "sys.exit({'sqlalchemy', 'litestar', 'rich.table'} & set(sys.modules) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stderr.startswith("error: There is no data directory")


def test_python_m() -> None:
    found = subprocess.run([sys.executable, "-m", "tidemill", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == __version__ + "\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_and_the_common_flags(run: Run, command: str) -> None:
    outcome = run(*command.split(), "--help")
    assert outcome.code == 0
    for flag in ("--data", "--json", "TIDEMILL_DATA", "TIDEMILL_CONTROL_URL"):
        assert flag in outcome.out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nope", "There is no command 'nope'."),
        ("tenent list", "Did you mean tenant?"),
        ("tenant lst", "Did you mean list?"),
        ("tenant create", "NAME"),
        ("usage", "--tenant"),
        ("usage --tenant", "--tenant"),
        ("usage --tenant a --recrods", "--records"),
        ("invoice --month 2026-11", "--tenant"),
        ("tenant list extra", "extra"),
        ("tenant create \udcff", "is not UTF-8"),
    ],
)
def test_what_is_not_understood_is_exit_2(run: Run, line: str, said: str) -> None:
    outcome = run(*line.split())
    assert outcome.code == 2 and said in outcome.complaint


def test_a_bug_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("tidemill.cli.tenant.source", broken)
    assert (
        run("tenant", "list").complaint
        == "unexpected RuntimeError: two lines Set TIDEMILL_DEBUG=1 to see the traceback."
    )
    monkeypatch.setenv("TIDEMILL_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(["tenant", "list"])


def test_ctrl_c(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tidemill.cli.tenant.source", interrupted)
    assert run("tenant", "list") == (130, "", "")


def test_a_reader_that_has_had_enough(up: Up) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tidemill", "model", "list", "--json", "--data", str(up.data)]
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert found.stderr == "" and found.returncode == 1


@pytest.mark.parametrize("answer", [b"<html>", b"[1]", b"{}", b'{"error": "x"}', b'{"error": {"message": "x"}}', b""])
@pytest.mark.parametrize("status", [200, 302, 500])
def test_something_else_answers_there(run: Run, monkeypatch: pytest.MonkeyPatch, status: int, answer: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("TIDEMILL_ADMIN_TOKEN", "t")
    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.handle_request, daemon=True).start()
    outcome = run("meter", "reconcile", "--json", "--control-url", f"http://127.0.0.1:{server.server_port}")
    server.server_close()
    if status == 200 and answer.startswith(b"{"):
        assert outcome.code == 0, "any object is a report"
    else:
        assert "is not Tidemill's control plane" in outcome.complaint


def test_an_answer_that_breaks_off(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(201)
            self.send_header("content-length", "100")
            self.end_headers()
            self.wfile.write(b"{")

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("TIDEMILL_ADMIN_TOKEN", "t")
    server = HTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.handle_request, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    complaint = run("credit", "grant", "--tenant", "a", "--amount", "1", "--control-url", url).complaint
    server.server_close()
    assert "check before you repeat it" in complaint


def test_output_for_a_terminal_without_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    output.print_json({"name": "华东"})
    output.print_table([("Tenant", "left")], [("华东",)])
    output.print_text("华东")
    sys.stdout.flush()
    document, *lines = raw.getvalue().decode("ascii").partition("}\n")[0::2]
    assert json.loads(document + "}") == {"name": "华东"}
    assert "\\u534e\\u4e1c" in lines[0]


def test_amounts_for_people() -> None:
    assert output.grouped("1234567.000001") == "1,234,567.000001"
    assert output.grouped("-1234.50") == "-1,234.50"
    assert output.grouped("-0.50") == "-0.50"
    assert output.grouped(1000) == "1,000"
    assert output.grouped("no price") == "no price"
