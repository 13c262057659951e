"""The command `tidemill`: one module per noun, imported lazily to keep `--help` quick."""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, UnknownCommandError

from tidemill import __version__
from tidemill.cli.output import complain
from tidemill.errors import TidemillError
from tidemill.suggestions import nearest

USAGE_ERROR = 2
"""Exit code of a command that was not understood; 1: it was, and failed."""
INTERRUPTED = 130

app = App(
    name="tidemill",
    help="Run a model cloud on a fleet of GPUs: serve models, meter each token once, bill by contract.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    help_epilogue="Every command has --help. With --json, a command prints exactly one JSON document.",
)
app.command("tidemill.cli.up:up", name="up", help="Start the platform in the foreground.")
app.command("tidemill.cli.demo:demo", name="demo", help="Show the main features in a minute, with a real model.")
app.command("tidemill.cli.tenant:app", name="tenant", help="Manage tenants, who are billed for usage.")
app.command("tidemill.cli.key:app", name="key", help="Manage the API keys of tenants.")
app.command("tidemill.cli.limit:app", name="limit", help="Manage limits: rates, concurrency and budgets.")
app.command("tidemill.cli.credit:app", name="credit", help="Grant credit to prepaid balances.")
app.command("tidemill.cli.usage:usage", name="usage", help="Show what a tenant used and what it cost.")
app.command("tidemill.cli.invoice:invoice", name="invoice", help="Print a tenant's invoice for a month.")
app.command("tidemill.cli.ledger:app", name="ledger", help="Check the ledger for consistency.")
app.command("tidemill.cli.margin:margin", name="margin", help="Show the revenue, cost and margin of each model.")
app.command("tidemill.cli.model:app", name="model", help="Manage the models served.")
app.command("tidemill.cli.fleet:app", name="fleet", help="Show devices and replicas, and drain them.")
app.command("tidemill.cli.job:app", name="job", help="Run jobs, such as training, on devices.")
app.command("tidemill.cli.queue:app", name="queue", help="Manage job queues: quotas and borrowing.")
app.command("tidemill.cli.reservation:app", name="reservation", help="Reserve devices for a tenant.")
app.command("tidemill.cli.batch:app", name="batch", help="Run batches of requests within 24 hours.")
app.command("tidemill.cli.meter:app", name="meter", help="Compare the meter with the engines' counters.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    A failure is one line on standard error, never a traceback.

    TIDEMILL_DEBUG=1 lets the traceback of an unexpected error through.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _check_encoding(tokens)
        result = app(
            tokens,
            exit_on_error=False,
            print_error=False,
            help_on_error=False,
            result_action="return_value",
        )
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        complain(_wording(error), hint="See --help.")
        return USAGE_ERROR
    except TidemillError as error:
        complain(error.message, hint=error.hint)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has had enough. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("TIDEMILL_DEBUG"):
            raise
        complain(f"unexpected {type(error).__name__}: {error}", hint="Set TIDEMILL_DEBUG=1 to see the traceback.")
        return 1


def _wording(error: CycloptsError) -> str:
    if not isinstance(error, UnknownCommandError) or not error.unused_tokens or error.app is None:
        return str(error)
    # Its own wording imports all commands to look for hidden ones.
    name, known = error.unused_tokens[0], [each for each in error.app if not each.startswith("-")]
    near = nearest(name, known)
    advice = f"Did you mean {near}?" if near else f"Known commands: {', '.join(sorted(known))}."
    return f"There is no command {name!r}. {advice}"


def _check_encoding(tokens: list[str]) -> None:
    for token in tokens:
        try:
            token.encode()
        except UnicodeEncodeError as error:
            raise CycloptsError(msg=f"The argument {token!a} is not UTF-8.") from error
