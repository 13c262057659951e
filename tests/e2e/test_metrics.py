"""A charge on every answer, and `/metrics`, on a platform with the real model, as official clients and Prometheus see
them.
"""

import os
import signal
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import anthropic
import httpx
import openai
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from tests.conftest import EMBEDDED
from tests.support.platform import Platform, start_platform, wait_until

MODEL = "smollm2-135m-instruct"
ASK: list[Any] = [{"role": "user", "content": "Count to twenty."}]
CONFIG = EMBEDDED + "\n[gateway]\ncharge_header = true\n\n[metrics]\nopen = true\n"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with start_platform(tmp_path_factory.mktemp("metrics"), CONFIG) as platform:
        yield platform


def charge_of(platform: Platform, request_id: str) -> str:
    """The charge of a request's record."""
    records = platform.cli("usage", "--tenant", "demo", "--records")["records"]
    (charge,) = [each["charge"] for each in records if each["request_id"] == request_id]
    return str(charge)


def told(text: str) -> str:
    """The amount of `0.000123 USD`."""
    amount, _, currency = text.partition(" ")
    assert currency == "USD"
    return amount


def comments_of(lines: Iterator[str]) -> list[str]:
    mark = ": x-tidemill-charge: "
    return [line.removeprefix(mark) for line in lines if line.startswith(mark)]


def test_openais_client_reads_what_an_answer_costs(platform: Platform) -> None:
    with openai.OpenAI(base_url=platform.url, api_key=platform.key, max_retries=0, timeout=60) as client:
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=ASK, max_tokens=12)
        usage = raw.parse().usage
        assert usage is not None and usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        fresh = usage.prompt_tokens - cached
        expected = Decimal(fresh) + Decimal("0.25") * cached + 2 * usage.completion_tokens
        amount = told(raw.headers["x-tidemill-charge"])
        assert Decimal(amount) == expected / 1_000_000
        assert amount == charge_of(platform, raw.headers["x-request-id"])


@pytest.mark.parametrize("with_usage", [True, False])
def test_openais_client_passes_over_the_charge_of_a_stream_and_a_reader_of_lines_finds_it(
    platform: Platform, with_usage: bool
) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if with_usage else {}
    asked: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 12, "stream": True, **options}
    with openai.OpenAI(base_url=platform.url, api_key=platform.key, max_retries=0, timeout=60) as client:
        chunks = list(client.chat.completions.create(**asked))
        assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
        assert (chunks[-1].usage is not None) is with_usage
        with client.chat.completions.with_streaming_response.create(**asked) as raw:
            lines = list(raw.iter_lines())
            (comment,) = comments_of(iter(lines))
            assert lines.index(f": x-tidemill-charge: {comment}") < lines.index("data: [DONE]")
            assert told(comment) == charge_of(platform, raw.headers["x-request-id"])
        text = "".join(
            event.delta
            for event in client.responses.create(model=MODEL, input="Count.", max_output_tokens=8, stream=True)
            if event.type == "response.output_text.delta"
        )
        assert text
        completion = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=6, stream=True)
        assert "".join(chunk.choices[0].text for chunk in completion if chunk.choices)


def test_anthropics_client_takes_the_charge_too(platform: Platform) -> None:
    url = platform.url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=url, api_key=platform.key, max_retries=0, timeout=60) as client:
        raw = client.messages.with_raw_response.create(model=MODEL, messages=ASK, max_tokens=12)
        assert told(raw.headers["x-tidemill-charge"]) == charge_of(platform, raw.headers["request-id"])
        with client.messages.stream(model=MODEL, messages=ASK, max_tokens=12) as stream:
            assert "".join(stream.text_stream)
            assert stream.get_final_message().usage.output_tokens > 0
        asked: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 12, "stream": True}
        with client.messages.with_streaming_response.create(**asked) as streamed:
            (comment,) = comments_of(streamed.iter_lines())
            assert told(comment) == charge_of(platform, streamed.headers["request-id"])


def scrape(platform: Platform, accept: str = "") -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """A page of metrics by name and labels."""
    answer = httpx.get(f"{platform.control_url}/metrics", headers={"accept": accept} if accept else {})
    assert answer.status_code == 200, answer.text
    parse = openmetrics if "openmetrics" in answer.headers["content-type"] else prometheus
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(answer.text)
        for sample in family.samples
    }


def value(page: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return page.get((f"tidemill_{name}", frozenset(labels.items())), 0.0)


def test_usage_logs_that_cannot_be_reached_show_as_lag_and_are_complained_of_once(platform: Platform) -> None:
    before = platform.cli("usage", "--tenant", "demo")["requests"]
    meter, aside = platform.data / "meter", platform.data / "aside"
    complaint = "loading failed; records wait in the logs"
    meter.rename(aside)
    try:
        with openai.OpenAI(base_url=platform.url, api_key=platform.key, max_retries=0, timeout=60) as client:
            client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=4)
        wait_until(lambda: value(scrape(platform), "loader_lag_seconds") > 3.5, 20)
        assert platform.output.read_text().count(complaint) == 1
        wait_until(lambda: value(scrape(platform), "loader_records_waiting") == 1, 10)
    finally:
        aside.rename(meter)
    wait_until(lambda: value(scrape(platform), "loader_lag_seconds") < 1, 20)
    assert platform.cli("usage", "--tenant", "demo")["requests"] == before + 1
    assert value(scrape(platform), "loader_records_waiting") == 0


def test_the_metrics_count_what_the_ledger_counts_over_the_death_of_a_gateway(platform: Platform) -> None:
    with openai.OpenAI(base_url=platform.url, api_key=platform.key, max_retries=0, timeout=60) as client:
        client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=12)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="none", messages=ASK)
        usage = platform.cli("usage", "--tenant", "demo")
        of_model = {"model": MODEL, "tier": "standard"}

        def agrees() -> bool:
            page = scrape(platform)
            return bool(value(page, "requests_total", **of_model, status="ok") == usage["requests"])

        wait_until(agrees, 10)
        page = scrape(platform, "application/openmetrics-text; version=1.0.0")
        assert value(page, "prompt_tokens_total", **of_model) == usage["prompt_tokens"]
        assert value(page, "cached_prompt_tokens_total", **of_model) == usage["cached_tokens"]
        assert value(page, "completion_tokens_total", **of_model) == usage["completion_tokens"]
        assert value(page, "requests_refused_total", code="model_not_found") == 1
        assert value(page, "time_to_first_token_seconds_count", **of_model) == usage["requests"]
        assert value(page, "time_to_first_token_seconds_bucket", **of_model, le="+Inf") == usage["requests"]
        assert 0 < value(page, "time_per_output_token_seconds_sum", **of_model)
        assert value(page, "log_records_total") == usage["requests"]
        assert value(page, "loader_records_total") == usage["requests"]
        assert value(page, "loader_records_waiting") == 0
        assert value(page, "replicas_ready", model=MODEL) == value(page, "replicas", model=MODEL) == 1
        assert value(page, "gateways_ready") == 1

        (pid,) = platform.pids("gateway")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: platform.pids("gateway") not in ([pid], []), 10)

        def served() -> bool:
            try:
                client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=4)
            except openai.APIError:
                return False
            return True

        wait_until(served, 10)
        wait_until(
            lambda: value(scrape(platform), "requests_total", **of_model, status="ok") == usage["requests"] + 1, 10
        )
        page = scrape(platform)
        assert value(page, "gateway_restarts_total") == 1
        assert value(page, "log_records_total") == usage["requests"] + 1
