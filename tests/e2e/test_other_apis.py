"""Anthropic's Messages and OpenAI's Responses on the real model, by their own clients, down to the ledger."""

import json
import uuid
from typing import Any

import anthropic
import openai
import pytest

from tests.support.platform import Platform, wait_until

MODEL = "smollm2-135m-instruct"
QUESTION: list[Any] = [{"role": "user", "content": "What is a tide mill?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"wheels": {"type": "integer"}},
    "required": ["wheels"],
    "additionalProperties": False,
}


class Customer:
    """A tenant of the test's own, with both clients."""

    def __init__(self, platform: Platform) -> None:
        self.name = f"t-{uuid.uuid4().hex[:8]}"
        self.platform = platform
        key = platform.new_tenant(self.name)
        base = platform.url.removesuffix("/v1")
        self.anthropic = anthropic.Anthropic(api_key=key, base_url=base, max_retries=0, timeout=60)
        self.openai = openai.OpenAI(api_key=key, base_url=platform.url, max_retries=0, timeout=60)

    def tokens(self, count: int = 1) -> list[tuple[int, int, int]]:
        """Prompt, cached and completion tokens of the tenant's records, once there are `count`."""
        found: list[Any] = []

        def enough() -> bool:
            found[:] = self.platform.usage(self.name)["records"]
            return len(found) >= count

        wait_until(enough)
        assert len(found) == count
        return sorted((each["prompt_tokens"], each["cached_tokens"], each["completion_tokens"]) for each in found)


@pytest.fixture
def customer(running: Platform) -> Customer:
    return Customer(running)


def of_message(message: anthropic.types.Message) -> tuple[int, int, int]:
    cached = message.usage.cache_read_input_tokens or 0
    return message.usage.input_tokens + cached, cached, message.usage.output_tokens


def of_response(response: Any) -> tuple[int, int, int]:
    used = response.usage
    return used.input_tokens, used.input_tokens_details.cached_tokens, used.output_tokens


def test_messages_whole_and_streamed(customer: Customer) -> None:
    client = customer.anthropic
    whole = client.messages.create(model=MODEL, max_tokens=8, system="Be brief.", messages=QUESTION)
    with client.messages.stream(model=MODEL, max_tokens=8, messages=QUESTION) as stream:
        said = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert streamed.content[0].type == "text" and streamed.content[0].text == said and said
    assert whole.stop_reason == streamed.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == streamed.usage.output_tokens == 8
    assert customer.tokens(2) == sorted([of_message(whole), of_message(streamed)])


def test_a_stream_tells_the_prompts_tokens_at_its_beginning(customer: Customer) -> None:
    with customer.anthropic.messages.stream(model=MODEL, max_tokens=4, messages=QUESTION) as stream:
        first = next(iter(stream))
        final = stream.get_final_message()
    assert first.type == "message_start"
    assert first.message.usage.input_tokens == final.usage.input_tokens


def test_tokens_are_counted_as_they_are_billed_and_counting_is_free(customer: Customer) -> None:
    client = customer.anthropic
    counted = client.messages.with_raw_response.count_tokens(model=MODEL, system="Be brief.", messages=QUESTION)
    message = client.messages.create(model=MODEL, max_tokens=1, system="Be brief.", messages=QUESTION)
    assert counted.headers["x-token-count"] == "exact"
    assert counted.parse().input_tokens == of_message(message)[0]
    assert customer.tokens() == [of_message(message)]


def test_an_answer_goes_on_from_its_beginning(customer: Customer) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "A tide mill is a water mill that"}]
    message = customer.anthropic.messages.create(model=MODEL, max_tokens=6, messages=turns)
    assert message.content[0].type == "text" and "A tide mill" not in message.content[0].text
    assert customer.tokens() == [of_message(message)]


def test_a_stop_sequence_and_a_schema(customer: Customer) -> None:
    client = customer.anthropic
    stopped = client.messages.create(model=MODEL, max_tokens=40, stop_sequences=["mill"], messages=QUESTION)
    assert "mill" not in str(stopped.content)
    schema: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    by_schema = client.messages.create(model=MODEL, max_tokens=40, output_config=schema, messages=QUESTION)
    assert by_schema.content[0].type == "text" and list(json.loads(by_schema.content[0].text)) == ["wheels"]
    text: Any = {"format": {"type": "json_schema", "name": "mill", "schema": SCHEMA}}
    response = customer.openai.responses.create(model=MODEL, input="How many wheels?", text=text, max_output_tokens=40)
    assert list(json.loads(response.output_text)) == ["wheels"]
    customer.tokens(3)


def test_what_the_model_cannot_do_is_refused_by_name_and_costs_nothing(customer: Customer) -> None:
    tool: Any = {"name": "f", "input_schema": {"type": "object"}}
    with pytest.raises(anthropic.BadRequestError, match="'tools'") as refused:
        customer.anthropic.messages.create(model=MODEL, max_tokens=8, messages=QUESTION, tools=[tool])
    assert refused.value.body["error"]["code"] == "unsupported_parameter"  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match=r"'reasoning\.effort'"):
        customer.openai.responses.create(model=MODEL, input="hi", reasoning={"effort": "low"})
    with pytest.raises(openai.BadRequestError, match="'web_search_options'"):
        customer.openai.chat.completions.create(model=MODEL, messages=QUESTION, web_search_options={})
    assert customer.platform.usage(customer.name)["records"] == []


def test_responses_and_going_on_from_them(customer: Customer) -> None:
    client = customer.openai
    first = client.responses.create(model=MODEL, input="What is a tide mill?", max_output_tokens=8)
    with client.responses.stream(
        model=MODEL, input="And in one word?", previous_response_id=first.id, max_output_tokens=200
    ) as stream:
        last = None
        for event in stream:
            last = event
    assert last is not None and last.type in ("response.completed", "response.incomplete")
    second = last.response
    assert of_response(second)[0] > of_response(first)[0] + 8  # the first turn is in the prompt
    assert customer.tokens(2) == sorted([of_response(first), of_response(second)])


def test_retrieving_a_stored_response_never_charges_again(customer: Customer) -> None:
    client = customer.openai
    made = client.responses.create(model=MODEL, input="What is a tide mill?", max_output_tokens=4)
    billed = customer.tokens()
    balance = customer.platform.usage(customer.name)["balance"]
    for _ in range(5):
        assert client.responses.retrieve(made.id).output_text == made.output_text
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    assert customer.tokens() == billed == [of_response(made)]
    assert customer.platform.usage(customer.name)["balance"] == balance
