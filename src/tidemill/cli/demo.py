"""`tidemill demo`: the main job told in about a minute, on the real model, on a platform of its own."""

import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from tidemill.cli import demo_burst as burst
from tidemill.cli.demo_platform import ANSWER_WITHIN_S, DemoAnswer, DemoPlatform, terminable
from tidemill.cli.demo_stage import DemoStage
from tidemill.cli.output import grouped, print_json
from tidemill.errors import BadInput, TidemillError
from tidemill.ledger.components import CACHED_INPUT, INPUT, OUTPUT
from tidemill.ledger.money import format_amount, parse_amount
from tidemill.ledger.pricing import Price

MODEL = "smollm2-135m-instruct"
COST_PER_HOUR = "0.60"
# Answers are what costs, as with a big reasoning model, and so much that a minute's use is a matter of cents.
PRICE = Price.of(input=parse_amount("1.00"), cached_input=parse_amount("0.20"), output=parse_amount("60.00"))
"""In USD per million tokens."""
CONFIG = f"""
issuer = "Tidemill demo"

[first_tenant]
name = "house"
credit = "0"

[models."{MODEL}"]
engine = "llamacpp"
threads = 1  # for so small a model: on a busy machine, threads that wait for each other cost more than they bring
cost_per_hour = "{COST_PER_HOUR}"
queue_seconds = {ANSWER_WITHIN_S}  # who is let in gets a turn, be the machine ever so busy

[prices."{MODEL}".USD]
input = "{format_amount(PRICE.rates[INPUT])}"
cached_input = "{format_amount(PRICE.rates[CACHED_INPUT])}"
output = "{format_amount(PRICE.rates[OUTPUT])}"

[prices."{MODEL}".CNY]
input = "7.00"
cached_input = "1.40"
output = "400.00"
"""

ACME, HAIZHOU, SHOAL = "acme", "海州云", "shoal"
TENANTS = {ACME: ("USD", "5"), HAIZHOU: ("CNY", "20"), SHOAL: ("USD", format_amount(burst.balance(MODEL, PRICE)))}
"""Name: currency and credit."""

LETTER = "Write a friendly letter that invites a friend to visit an old mill by the sea."
HARBOUR = "Describe a harbour at night, when the tide comes in."
STORY = "Write a long story about a miller who lives by the sea."
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
STORY_TOKENS = 1000
WRITING = {"temperature": 0.4, "frequency_penalty": 0.6}
RECONCILE_WITHIN_S = 10.0
WINDOW = "tidemill demo"
SHORT = (2, 3, 7)
"""The acts of the short picture: what is served, what is held, and that it adds up."""


class StoryBroken(TidemillError):
    """Something that the demo claims did not come out so. That is a defect: please report it."""


class DemoFacts(msgspec.Struct):
    """What the demo has seen, for --json and for its own conclusions. Amounts are decimal strings."""

    seconds: float = 0.0
    ready_seconds: float = 0.0
    tenants: dict[str, Any] = {}
    """Each tenant's statement, with what it was granted."""
    answered: int = 0
    refused: int = 0
    lowest_balance: str = ""
    """Of the tenant with the small balance, in the whole demo."""
    stopped_after_tokens: int = 0
    stopped_with: str = ""
    """The error code of the last event of the stream that ate the balance up."""
    client_tokens: int = 0
    """Prompt and completion tokens of all answers, as the clients were told."""
    metered_tokens: int = 0
    invoice: dict[str, Any] = {}
    margin: dict[str, Any] = {}
    reconciliation: dict[str, Any] = {}
    holds: dict[str, bool] = {}
    """What the demo claims, and whether it was so."""


def demo(
    *,
    svg: Path | None = None,
    svg_short: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Show the main features in about a minute, with a real model.

    Tenants, streams, a limit that holds, the invoice.

    It runs a platform of its own, in a temporary directory and on free ports, and removes it afterwards.

    Parameters
    ----------
    svg
        Save all of it as an SVG picture.
    svg_short
        Save three acts of it as a smaller SVG picture.
    as_json
        Show nothing, and print the results as one JSON document.
    """
    for option, picture in (("svg", svg), ("svg-short", svg_short)):
        if picture is not None and not picture.parent.is_dir():
            raise BadInput(f"There is no directory {picture.parent} for the picture.", param=option)
    stage = DemoStage(quiet=as_json)
    facts = play(stage)
    if svg is not None:
        stage.save(svg, title=WINDOW)
    if svg_short is not None:
        stage.save_acts(svg_short, SHORT, title=WINDOW)
    if as_json:
        print_json(msgspec.to_builtins(facts))
    broken = [claim for claim, holds in facts.holds.items() if not holds]
    if broken:
        raise StoryBroken(f"This did not hold: {'; '.join(broken)}.", hint="Please report it, with --json's output.")


def play(stage: DemoStage) -> DemoFacts:
    """Tell the story on `stage`. Raises TidemillError when the platform does not start or does not answer."""
    began = time.monotonic()
    facts = DemoFacts()
    stage.title("Tidemill", "one model, three tenants, one meter")
    with (
        terminable(),
        tempfile.TemporaryDirectory(prefix="tidemill-demo-") as directory,
        DemoPlatform(Path(directory), CONFIG, stage.progress) as platform,
    ):
        facts.ready_seconds = round(time.monotonic() - began, 1)
        stage.say(f"A platform of its own is ready after {facts.ready_seconds} s, with {MODEL} on this processor.")
        _Story(stage, platform, facts).tell()
        stage.progress("stopping the platform")
    facts.seconds = round(time.monotonic() - began, 1)
    stage.verdict(facts.holds, facts.seconds)
    return facts


class _Story:
    """The acts, in order."""

    def __init__(self, stage: DemoStage, platform: DemoPlatform, facts: DemoFacts) -> None:
        self.stage = stage
        self.platform = platform
        self.facts = facts
        self.operator = platform.operator()
        self.keys: dict[str, str] = {}
        self.answers: list[DemoAnswer] = []
        self.month = datetime.now(UTC).strftime("%Y-%m")

    def tell(self) -> None:
        self.tenants()
        self.streams()
        self.burst()
        self.last_of_the_balance()
        self.statement()
        self.invoice()
        self.margin_and_meter()

    def tenants(self) -> None:
        self.stage.act("Tenants with prepaid balances", "tidemill tenant create · credit grant · key create")
        rows = []
        for name, (currency, credit) in TENANTS.items():
            self.operator.create_tenant(name, currency)
            granted = self.operator.grant_credit(name, credit, "demo", None)
            key = self.operator.create_key(name, "demo")
            self.keys[name] = key["key"]
            rows.append((name, currency, granted["balance"], key["hint"]))
        self.stage.table([("tenant", ""), ("pays in", ""), ("balance", "right"), ("key", "")], rows)

    def streams(self) -> None:
        self.stage.act("Streams side by side", "POST /v1/chat/completions, as OpenAI's clients send it")
        asked = {ACME: (LETTER, 7), HAIZHOU: (HARBOUR, 1)}
        answers = {name: DemoAnswer() for name in asked}
        for name, (prompt, seed) in asked.items():
            self._ask(name, answers[name], _stream(prompt, max_tokens=130, seed=seed))
        finished = lambda: all(answer.done for answer in answers.values())  # noqa: E731
        self.stage.live(lambda: self.stage.side_by_side([(name, answers[name], None) for name in asked]), finished)
        charges = {name: self._record(name, answer) for name, answer in answers.items()}
        self.stage.show(self.stage.side_by_side([(name, answers[name], charges[name]) for name in asked]))
        self.stage.say("Each usage record was on disk before the client got the end of its stream.")

    def burst(self) -> None:
        enough = f"enough for {burst.ENOUGH_FOR}"
        self.stage.act("A limit that holds", f"{burst.BURST} requests at once on {TENANTS[SHOAL][1]} USD, {enough}")
        answers = [DemoAnswer() for _ in range(burst.BURST)]
        for number, answer in enumerate(answers):
            self._ask(SHOAL, answer, burst.wanted(MODEL, number))
        with self._watching_balance():
            self.stage.live(
                lambda: self.stage.dots([answer.status for answer in answers]),
                lambda: all(answer.done for answer in answers),
            )
        self.stage.show(self.stage.dots([answer.status for answer in answers]))
        facts = self.facts
        facts.answered = sum(answer.status == 200 for answer in answers)
        facts.refused = sum(answer.status == 402 for answer in answers)
        facts.holds["each request answered, or refused with 402"] = facts.answered + facts.refused == burst.BURST
        facts.holds[f"a balance for {burst.ENOUGH_FOR} let {burst.ENOUGH_FOR} in"] = facts.answered == burst.ENOUGH_FOR
        refusal = next((answer.error["code"] for answer in answers if answer.status == 402 and answer.error), "")
        self.stage.say(
            f"{facts.answered} answered, {facts.refused} refused with 402 {refusal} before any work was done:"
            " the most that a request can cost is held before it starts."
        )

    def last_of_the_balance(self) -> None:
        left = self._balance(SHOAL)
        self.stage.act("A stream that eats the rest", f"{STORY_TOKENS:,} tokens wanted, {left} USD there")
        answer = DemoAnswer()
        self._ask(SHOAL, answer, _stream(STORY, max_tokens=STORY_TOKENS, seed=7))
        with self._watching_balance():
            self.stage.live(lambda: self.stage.one(SHOAL, answer, None), lambda: answer.done)
        record = self._record(SHOAL, answer)
        self.stage.show(self.stage.one(SHOAL, answer, record))
        facts = self.facts
        facts.stopped_with = (answer.error or {}).get("code", "")
        facts.stopped_after_tokens = record["completion_tokens"]
        stopped = facts.stopped_with == "insufficient_quota" and record["status"] == "balance_exhausted"
        facts.holds["the stream stopped at an empty balance"] = stopped
        facts.holds["the balance was never negative"] = parse_amount(facts.lowest_balance) >= 0

    def statement(self) -> None:
        self.stage.act("The statement", "tidemill usage --tenant NAME")
        rows = []
        exact = True
        for name, (_, credit) in TENANTS.items():
            usage = self.operator.usage(name, None, records=True)
            granted = parse_amount(credit)
            self.facts.tenants[name] = {**usage, "granted": format_amount(granted)}
            exact &= granted - parse_amount(usage["charge"]) == parse_amount(usage["balance"])
            exact &= sum(parse_amount(record["charge"]) for record in usage["records"]) == parse_amount(usage["charge"])
            counts = (grouped(usage[what]) for what in COUNTS)
            rows.append((name, *counts, usage["charge"], usage["balance"], usage["currency"]))
        columns = ["requests", "prompt", "cached", "completion", "charge", "balance"]
        self.stage.table([("tenant", ""), *((title, "right") for title in columns), ("", "")], rows)
        seen = [answer.usage or {} for answer in self.answers if answer.status == 200]
        self.facts.client_tokens = sum(usage.get("total_tokens", 0) for usage in seen)
        statements = self.facts.tenants.values()
        self.facts.metered_tokens = sum(each["prompt_tokens"] + each["completion_tokens"] for each in statements)
        self.facts.holds["granted - charged = balance, to the nano"] = exact
        equal = self.facts.client_tokens == self.facts.metered_tokens > 0
        self.facts.holds["tokens that clients saw = tokens metered"] = equal
        self.stage.say(
            f"The clients' own count: {self.facts.client_tokens:,} tokens. The meter's: {self.facts.metered_tokens:,}."
        )

    def invoice(self) -> None:
        self.stage.act("The invoice", f"tidemill invoice --tenant {HAIZHOU} --month {self.month}")
        self.facts.invoice = invoice = self.operator.invoice(HAIZHOU, self.month)
        text = self.operator.invoice_text(HAIZHOU, self.month)
        self.stage.page(_middle_of(text))
        records = self.facts.tenants[HAIZHOU]["records"]
        subtotal = parse_amount(invoice["subtotal"])
        same = sum(parse_amount(record["charge"]) for record in records) == subtotal
        same &= sum(parse_amount(line["amount"]) for line in invoice["lines"]) == subtotal
        self.facts.holds["invoice = its lines = its usage records"] = same

    def margin_and_meter(self) -> None:
        self.stage.act("The margin, and the proof", "tidemill margin · tidemill meter reconcile")
        self.facts.margin = margin = self.operator.margin(self.month)
        deadline = time.monotonic() + RECONCILE_WITHIN_S
        while True:
            self.facts.reconciliation = found = self.operator.reconcile()
            equal = bool(found["replicas"]) and all(line["verdict"] == "equal" for line in found["replicas"])
            if equal or time.monotonic() > deadline:  # an engine adds to its counters a moment after its last token
                break
            time.sleep(0.3)
        self.facts.holds["the engine's own counters = the records"] = equal
        self.stage.margin_and_meter(margin, found)

    def _ask(self, tenant: str, answer: DemoAnswer, wanted: dict[str, Any]) -> None:
        self.answers.append(answer)
        arguments = (self.keys[tenant], answer)
        threading.Thread(target=self.platform.chat, args=arguments, kwargs=wanted, daemon=True).start()

    def _record(self, tenant: str, answer: DemoAnswer) -> Mapping[str, Any]:
        """The usage record of an answer; it is on disk before the answer ends, so it is there."""
        for record in self.operator.usage(tenant, None, records=True)["records"]:
            if record["request_id"] == answer.request_id:
                return dict(record)
        raise StoryBroken(f"A request of {tenant} left no record ({answer.error or 'no error was seen'}).")

    def _balance(self, tenant: str) -> str:
        return str(next(each["balance"] for each in self.operator.tenants()["tenants"] if each["name"] == tenant))

    def _watching_balance(self) -> "_Watch":
        return _Watch(self)

    def note_balance(self) -> None:
        """Keep the lowest balance of the tenant with the small one."""
        nanos = parse_amount(self._balance(SHOAL))
        known = self.facts.lowest_balance
        self.facts.lowest_balance = format_amount(min(nanos, parse_amount(known)) if known else nanos)


class _Watch:
    """Looks at the small balance again and again while something goes on, and once after."""

    def __init__(self, story: _Story) -> None:
        self._story = story
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._story.note_balance()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            with suppress(TidemillError):
                self._story.note_balance()


def _stream(prompt: str, *, max_tokens: int, seed: int) -> dict[str, Any]:
    wanted: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **WRITING}
    wanted |= {"max_tokens": max_tokens, "seed": seed, "stream": True, "stream_options": {"include_usage": True}}
    return wanted


def _middle_of(invoice: str) -> str:
    """The lines and the sums of an invoice, without its head and its notes."""
    lines = invoice.splitlines()
    start = next((at for at, line in enumerate(lines) if line.split()[:2] == ["tokens", "requests"]), 0)
    end = next((at for at, line in enumerate(lines) if line.startswith("AMOUNT DUE")), len(lines) - 1)
    return "\n".join([lines[0], *lines[start : end + 1]])
