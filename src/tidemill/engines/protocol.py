"""What the gateway needs to know of an engine.

How it is asked, and how its counts are read out of its answers.
"""

from collections.abc import Mapping
from typing import Protocol

import msgspec


class TokenCounts(msgspec.Struct, frozen=True, gc=False):
    """Counts as an engine reports them.

    `prompt` includes `cached` and `cache_write`, `completion` includes `reasoning`.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    """0 also where the engine does not tell."""
    cache_write: int = 0
    """Prompt tokens that were written into a cache which the client asked for, and are priced so."""
    searches: int = 0
    """Search units of a ranking, where the engine bills by them."""


class Counters(msgspec.Struct, frozen=True):
    """An engine's own running totals since it started, in tokens; prompt tokens served from its cache included."""

    prompt: int
    completion: int


class Ask(msgspec.Struct):
    """A request on its way to an engine: a JSON object in the form of its path's API.

    Its values are still undecoded.
    """

    path: bytes
    """The endpoint for it, below `/v1`: `/chat/completions`, `/completions`, `/embeddings` of OpenAI's API, whose form
    the fields then have; `/rerank`; `/messages` of Anthropic's API."""
    fields: dict[str, msgspec.Raw]
    stream: bool
    wants_usage: bool
    """The client asked for the usage chunk at the end of the stream."""
    choices: int
    """How many answers it asks for: OpenAI's `n`, times the prompts."""
    max_tokens_field: str
    """`max_tokens` or `max_completion_tokens`, whichever the client used."""
    max_tokens: int | None
    """The client's limit for each choice, if it set one."""
    prompts: int = 1
    """How many prompts it carries: more than one in a text completion, and the documents of a ranking."""
    generates: bool = True
    """False for embeddings and rankings: nothing is produced token by token, nothing is limited."""
    documents: int = 0
    """How many documents it has ranked."""
    searches: int = 0
    """The search units of that, where the engine does not tell them."""
    searches_bound: int = 0
    """The most that an engine can tell."""
    filler: bool = False
    """It can wait: an engine that orders its requests by priority takes people's before it."""
    body: bytes = b""
    """The client's own JSON, of a request that an engine may take as it is."""
    betas: bytes = b""
    """The client's `anthropic-beta` header."""
    made: object = None
    """What the engine has made of it: its own business."""


class Refusal(msgspec.Struct, frozen=True):
    """A parameter that will not be honoured, and what to do."""

    parameter: str
    hint: str


Harmless = tuple[object, ...]
"""The values of a parameter that ask for nothing special. Null and an empty list always do."""
Unsupported = Mapping[str, tuple[Harmless, str]]
"""Parameters that an engine has nothing for: what of each is harmless, and what to do instead."""


class Probe(msgspec.Struct, frozen=True):
    """A page that says whether a server is well.

    It is with status 200, and is not without an answer or with a status from 500 on.
    """

    path: bytes
    at_root: bool = False
    """Below the server's address; else below its base URL, which ends in `/v1`."""


class Tap(Protocol):
    """Reads a stream on its way through. It looks at each chunk only as far as metering needs."""

    done: bool
    """The engine has said that the stream is complete ([DONE])."""
    failed: bool
    """The engine has sent an error event in mid-stream."""
    counts: TokenCounts
    exact: bool
    """`counts` are the engine's own figures (so far), not an estimate."""

    @property
    def begun(self) -> bool:
        """Something of the answer has come; comments and other signs of life are nothing."""
        ...

    @property
    def produced(self) -> int:
        """Completion tokens so far, as well as they are known."""
        ...

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the engine; return whole events for the client, without the final [DONE]."""
        ...

    def end(self) -> bytes:
        """Take the end of the body: an event whose closing blank line is missing is returned after all."""
        ...

    @property
    def estimated_completion(self) -> int:
        """The completion tokens of `estimate`."""
        ...

    def estimate(self, prompt_bytes: int) -> TokenCounts:
        """The best count of what has passed, for a stream whose engine did not report."""
        ...


class Engine(Protocol):
    """How to speak to one kind of engine."""

    kind: str
    owned: bool
    """True: it is the operator's, and is aborted when the client leaves. False: it bills the operator, so it is
    drained within a bound to learn what it bills."""
    collects: bool
    """True: also an answer that the client wants whole is asked for as a stream and put together by the gateway,
    so that its tokens are counted while they are produced."""
    unsupported: Unsupported
    """What it would leave out without a word, or what must not reach it; refused by name (`engines.capabilities`)."""
    native: frozenset[bytes]
    """Paths of `Ask`s that it takes, and answers, in the form that the client speaks."""
    probes: tuple[Probe, ...]
    """Asked in this order when somebody else runs it: any other status means that it has no such page, but of the
    last one, where a refusal is an answer too."""

    def auth_headers(self, key: str | None) -> Mapping[str, str]:
        """The headers of every request: how it is told the operator's key, if there is one."""
        ...

    def path(self, ask: Ask) -> bytes:
        """Where the engine takes `ask`, below its base URL."""
        ...

    def headers(self, ask: Ask) -> bytes:
        """Further header lines of this request, each with its CRLF."""
        ...

    def unseen_tokens(self, ask: Ask) -> int:
        """Tokens that the prompt may have beyond one for each byte of its JSON; a hold has to cover them."""
        ...

    def refuses(self, ask: Ask) -> Refusal | None:
        """A parameter that it cannot honour, beyond what it `unsupported`."""
        ...

    def body(self, ask: Ask, *, model: str, output_cap: int) -> bytes:
        """The request body for the engine; each choice is limited to `output_cap` tokens."""
        ...

    def tap(self, ask: Ask) -> Tap:
        """A reader for the stream that answers `ask`."""
        ...

    def usage(self, body: bytes) -> TokenCounts | None:
        """What a whole answer says that it used; None when it doesn't.

        Raises BrokenStream when it is not JSON.
        """
        ...

    def answer(self, ask: Ask, body: bytes) -> bytes:
        """A whole answer, in the form that `ask` has. Raises BrokenStream."""
        ...

    def count(self, ask: Ask, *, model: str) -> tuple[bytes, bytes] | None:
        """The path and the body of a request that counts the prompt exactly; None where the engine can't."""
        ...

    def counters(self, metrics: str) -> Counters | None:
        """The engine's own totals, from its Prometheus page; None when they are not on it."""
        ...
