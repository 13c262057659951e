"""What the end of an answer means: the table of docs/policies.md, row by row, and what it comes to in a relay."""

import itertools
import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.paths import ROOT
from tests.support.upstream import DONE, completion, event, role, usage, word
from tidemill.engines.openai import OpenAIEngine
from tidemill.engines.protocol import TokenCounts
from tidemill.engines.sse import BrokenStream
from tidemill.gateway.admission.holds import Hold
from tidemill.gateway.protocols.reply import OpenAIReply
from tidemill.gateway.protocols.request import read_chat
from tidemill.gateway.proxy.relay import ENDINGS, Billed, Cause, Client, Relay, Told, rule_for
from tidemill.http.client import EngineLost
from tidemill.ledger.money import Nanos
from tidemill.ledger.usage import RequestStatus

BODY = b'{"model":"mock","stream":true,"messages":[{"role":"user","content":"one two three"}]}'
REQUEST = read_chat(BODY)
ERROR = event({"error": {"message": "boom"}})


def relay(*, owned: bool = False, cap: int | None = None) -> Relay:
    """A relay of a stream; `cap`: the balance pays for so many tokens."""
    hold = Hold(Nanos(1000), cap or 256, cut_short=cap is not None, purses=("ten_1",))
    return Relay(OpenAIEngine(owned=owned), REQUEST, hold, OpenAIReply(REQUEST, "req_1"))


def table_of_the_docs() -> list[list[str]]:
    page = (ROOT / "docs/policies.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("| cause | client |")
    rows = [line for line in rest.splitlines()[2:] if line.startswith("|")]
    until = next(index for index, line in enumerate(rest.splitlines()) if index > 1 and not line.startswith("|"))
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in rows[: until - 2]]


def test_the_policies_page_has_the_table_as_it_is() -> None:
    said = {None: "", True: "yes", False: "no"}
    assert table_of_the_docs() == [
        [
            rule.cause,
            rule.client or "",
            said[rule.used_up],
            said[rule.all_came],
            said[rule.unreported],
            rule.status,
            rule.billed,
            rule.told,
        ]
        for rule in ENDINGS
    ]


def test_every_end_fits_a_row_and_every_row_is_used() -> None:
    used = set()
    yes_no = (True, False)
    for cause, client, used_up, all_came, unreported in itertools.product(Cause, Client, yes_no, yes_no, yes_no):
        rule = rule_for(cause, client, used_up=used_up, all_came=all_came, unreported=unreported)
        assert rule.cause is cause
        used.add(ENDINGS.index(rule))
    assert used == set(range(len(ENDINGS)))


@pytest.mark.parametrize("unreported", [True, False])
@pytest.mark.parametrize("all_came", [True, False])
@pytest.mark.parametrize("used_up", [True, False])
@pytest.mark.parametrize("client", Client)
@pytest.mark.parametrize("cause", Cause)
def test_rules_that_hold_over_the_whole_table(
    cause: Cause, client: Client, used_up: bool, all_came: bool, unreported: bool
) -> None:
    rule = rule_for(cause, client, used_up=used_up, all_came=all_came, unreported=unreported)
    if rule.status is RequestStatus.ENGINE_ERROR:
        assert rule.billed is Billed.NOTHING
    if rule.status is RequestStatus.OK:
        assert cause is Cause.DONE or all_came
    if rule.status is RequestStatus.CLIENT_CLOSED:
        assert client is Client.LEFT
    if cause is Cause.ENGINE_LOST and client is Client.WAITS:
        assert rule.billed is Billed.NOTHING  # it gets an error, and nothing else
    if rule.told is Told.END:
        assert cause in (Cause.DONE, Cause.ERROR_EVENT)
    if rule.told is Told.STOP:
        assert used_up or cause is Cause.CAP


LOST = EngineLost("The engine has closed the connection.")
UNSENT = EngineLost("It refuses connections.", sent=False)
SAID = (role(), word("hi"))
WHOLE = (role(), word("hi"), usage(7, 3, 2), DONE)
REPORTED = TokenCounts(7, 2, 3)
NONE = TokenCounts()


class Case(msgspec.Struct, kw_only=True):
    """An end, and what it comes to. `counts` None: those that have passed, counted by the tap."""

    cause: Cause
    client: Client
    events: tuple[bytes, ...] = ()
    cap: int | None = None
    owned: bool = False
    failure: Exception | None = None
    status: RequestStatus
    counts: TokenCounts | None = None
    estimated: bool = False
    told: Told = Told.NOTHING


CASES = {
    "done": Case(
        cause=Cause.DONE, client=Client.READS, events=WHOLE, status=RequestStatus.OK, counts=REPORTED, told=Told.END
    ),
    "done, and the client has left": Case(
        cause=Cause.DONE, client=Client.LEFT, events=WHOLE, status=RequestStatus.CLIENT_CLOSED, counts=REPORTED
    ),
    "done at the balance": Case(
        cause=Cause.DONE, client=Client.READS, events=WHOLE, cap=3, status=RequestStatus.BALANCE_EXHAUSTED,
        counts=REPORTED, told=Told.STOP,
    ),
    "cut off at the balance": Case(
        cause=Cause.CAP, client=Client.READS, events=SAID + (word("x"),) * 30, cap=3,
        status=RequestStatus.BALANCE_EXHAUSTED, estimated=True, told=Told.STOP,
    ),
    "an error event": Case(
        cause=Cause.ERROR_EVENT, client=Client.READS, events=(*SAID, ERROR, DONE), status=RequestStatus.ENGINE_LOST,
        estimated=True, told=Told.END,
    ),
    "an error event after the client has left": Case(
        cause=Cause.ERROR_EVENT, client=Client.LEFT, events=(*SAID, ERROR), status=RequestStatus.ENGINE_LOST,
        estimated=True,
    ),
    "lost, the client has left and all had come": Case(
        cause=Cause.ENGINE_LOST, client=Client.LEFT, events=WHOLE, owned=True, failure=LOST, status=RequestStatus.OK,
        counts=REPORTED,
    ),
    "an upstream that did not say": Case(
        cause=Cause.ENGINE_LOST, client=Client.LEFT, failure=LOST, status=RequestStatus.CLIENT_CLOSED,
        counts=TokenCounts(len(BODY) // 4), estimated=True,
    ),
    "an upstream that was never asked": Case(
        cause=Cause.ENGINE_LOST, client=Client.LEFT, failure=UNSENT, status=RequestStatus.CLIENT_CLOSED, counts=NONE
    ),
    "an own engine that was stopped before it spoke": Case(
        cause=Cause.ENGINE_LOST, client=Client.LEFT, owned=True, failure=LOST, status=RequestStatus.CLIENT_CLOSED,
        counts=NONE,
    ),
    "lost before anything was sent": Case(
        cause=Cause.ENGINE_LOST, client=Client.WAITS, events=SAID, owned=True, failure=LOST,
        status=RequestStatus.ENGINE_LOST, counts=NONE, told=Told.ERROR,
    ),
    "lost in mid-stream": Case(
        cause=Cause.ENGINE_LOST, client=Client.READS, events=SAID, failure=LOST, status=RequestStatus.ENGINE_LOST,
        estimated=True, told=Told.ERROR,
    ),
    "refused": Case(
        cause=Cause.ENGINE_REFUSED, client=Client.WAITS, failure=LOST, status=RequestStatus.ENGINE_ERROR, counts=NONE,
        told=Told.ERROR,
    ),
    "a fault of the gateway": Case(
        cause=Cause.GATEWAY_FAULT, client=Client.READS, events=SAID, status=RequestStatus.ENGINE_LOST, estimated=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_an_end_comes_to(case: Case) -> None:
    each = relay(owned=case.owned, cap=case.cap)
    for one in case.events:
        each.tap.feed(one)
    ending = each.close(case.cause, case.client, case.failure)
    assert (ending.status, ending.estimated, ending.told) == (case.status, case.estimated, case.told)
    assert ending.counts == (each.estimate() if case.counts is None else case.counts)
    assert (ending.error is not None) == (case.told in (Told.ERROR, Told.STOP))


def test_a_client_that_has_left_is_told_nothing_and_nothing_is_kept_of_the_answer() -> None:
    """A reply that keeps its answer (Responses) has not seen the rest, so it must not be asked for an end."""

    class Keeps(OpenAIReply):
        def end(self, counts: TokenCounts) -> bytes:
            raise AssertionError("asked for the end of an answer that it has not seen")

        def stopped(self, error: object) -> bytes:
            raise AssertionError("asked for the end of an answer that it has not seen")

    for cause, failure in itertools.product(Cause, (LOST, UNSENT, BrokenStream("not JSON"))):
        each = relay()
        each.reply = Keeps(REQUEST, "req_1")
        each.tap.feed(role() + word("one "))
        assert each.last_events(each.close(cause, Client.LEFT, failure)) == b""


def test_a_whole_answer() -> None:
    each = relay()
    ending, answer = each.whole(b'{"usage":{"prompt_tokens":7,"completion_tokens":3}}', Client.WAITS)
    assert (ending.status, ending.counts, ending.told) == (RequestStatus.OK, TokenCounts(7, 0, 3), Told.END)
    assert answer == b'{"usage":{"prompt_tokens":7,"completion_tokens":3}}'
    cut = relay(cap=3)
    assert cut.whole(answer, Client.WAITS)[0].status is RequestStatus.BALANCE_EXHAUSTED
    assert cut.whole(answer, Client.WAITS)[0].told is Told.END, "an answer in one piece ends by its finish reason"
    silent = json.dumps(completion("x" * 400)).encode()
    ending, _ = each.whole(silent, Client.WAITS)
    assert ending.estimated and ending.counts == TokenCounts(len(BODY) // 4, 0, len(silent) // 4)
    with pytest.raises(BrokenStream):
        each.whole(b"<html>", Client.WAITS)


@given(tokens=st.integers(0, 60), cap=st.integers(1, 20), exact=st.booleans())
def test_a_stream_is_cut_only_beyond_what_the_balance_pays_for(tokens: int, cap: int, exact: bool) -> None:
    each = relay(cap=cap)
    each.tap.feed(role() + b"".join(word("x") for _ in range(tokens)) + (usage(1, tokens) if exact else b""))
    assert each.over_the_cap == (tokens > (cap if exact else 2 * cap + 16))
    assert not relay().over_the_cap


def test_errors_that_a_client_reads_name_no_format_of_python() -> None:
    told = relay().close(Cause.ENGINE_LOST, Client.WAITS, BrokenStream("an event is longer than 8 bytes")).error
    assert told is not None and re.fullmatch(r"The engine's stream is broken: an event is .*\.", str(told))
    assert "cannot be reached" in str(relay().close(Cause.ENGINE_LOST, Client.WAITS, UNSENT).error)
