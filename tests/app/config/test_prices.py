"""Prices in the configuration: a key for each component, in batches too; what was taken before is taken as before."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.app.config.test_load import MOCK, read
from tidemill.app.config.schema.prices import BATCH, CostConfig, PriceConfig
from tidemill.control.api.models import Rates
from tidemill.errors import ConfigError
from tidemill.ledger.components import CACHED_INPUT, CATALOGUE, INPUT, OUTPUT, Component
from tidemill.ledger.money import format_amount, parse_amount
from tidemill.ledger.pricing import Price


def config(tmp_path: Path, *lines: str) -> "PriceConfig":
    return read(tmp_path, MOCK + "[prices.mock]\n" + "\n".join(lines) + "\n").prices["mock"]["USD"]


def test_each_component_has_a_key_and_one_for_batches() -> None:
    keys = {component.key for component in CATALOGUE}
    assert set(PriceConfig.__struct_fields__) == keys | {BATCH + key for key in keys}
    assert set(CostConfig.__struct_fields__) == keys


def test_the_api_tells_the_rate_of_each_component() -> None:
    assert set(Rates.__struct_fields__) == {component.key for component in CATALOGUE}


def test_further_components(tmp_path: Path) -> None:
    table = config(
        tmp_path,
        'input = "3"\noutput = "15"\ncached_input = "0.3"\ncache_write = "3.75"\nreasoning_output = "20"',
        'search = "2.00"\nbatch_search = "0.90"\nimage = "0.000000003"',
    )
    assert table.price() == Price.of(
        input=3 * 10**9,
        cached_input=3 * 10**8,
        cache_write=3_750_000_000,
        output=15 * 10**9,
        reasoning_output=20 * 10**9,
        search=2 * 10**9,
        image=3,
    )
    batch = table.batch_price().rates
    assert (batch[Component.CACHE_WRITE], batch[Component.SEARCH], batch[Component.IMAGE]) == (
        1_875_000_000,
        9 * 10**8,
        2,
    )


def test_what_is_billed_otherwise_needs_no_price_of_tokens(tmp_path: Path) -> None:
    assert config(tmp_path, 'search = "2.00"').price() == Price.of(search=2 * 10**9)
    assert config(tmp_path, 'document = "0.50"').batch_price() == Price.of(document=25 * 10**7)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('input = "1"', "prices.mock: missing key `output`."),
        ('output = "1"', "prices.mock: missing key `input`."),
        ('batch_input = "1"', "prices.mock: missing key `input`."),
        ("", "prices.mock: missing key `input`."),
        ('serach = "2"', "unknown key prices.mock.serach. Did you mean prices.mock.search?"),
        ('search = "2"\nbatch_serach = "2"', "Did you mean prices.mock.batch_search?"),
        (
            'search = "-2"',
            "prices.mock: the price of search must be zero or more per thousand searches",
        ),
        ('image = "10001"', "prices.mock: the price of image is 10001.00 per image; the maximum is 10000.00"),
        ('search = "1"\nbatch_search = "x"', "prices.mock: 'x' is not an amount"),
        ("search = 2", "mock.search: expected a string, got an integer. Strings and amounts are written in quotes"),
    ],
)
def test_a_mistake_is_refused_by_name(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(tmp_path, line)
    assert words in str(refused.value)


def batch_before(given: dict[str, int]) -> tuple[int, int, int]:
    """What batches cost when a price had three rates, frozen."""

    def half(nanos: int) -> int:
        return (nanos * 2 + 2) // 4

    cached = half(given.get("cached_input", given["input"]))
    if "batch_input" in given and "cached_input" not in given:
        cached = given["batch_input"]
    return (
        given.get("batch_input", half(given["input"])),
        given.get("batch_cached_input", cached),
        given.get("batch_output", half(given["output"])),
    )


amounts = st.integers(0, 10**12)
old_keys = st.fixed_dictionaries(
    {"input": amounts, "output": amounts},
    optional=dict.fromkeys(("cached_input", "batch_input", "batch_cached_input", "batch_output"), amounts),
)


@given(old_keys)
def test_prices_of_tokens_are_what_they_were(given: dict[str, int]) -> None:
    table = msgspec.convert({key: format_amount(nanos) for key, nanos in given.items()}, PriceConfig)
    whole = given["input"], given.get("cached_input", given["input"]), given["output"]
    assert table.price().rates == dict(zip((INPUT, CACHED_INPUT, OUTPUT), whole, strict=True))
    assert table.batch_price().rates == dict(zip((INPUT, CACHED_INPUT, OUTPUT), batch_before(given), strict=True))


def test_what_an_upstream_bills_has_the_same_keys(tmp_path: Path) -> None:
    cost = 'cost = { input = "2", output = "9", cache_write = "2.50" }\n'
    dear = read(tmp_path, MOCK + cost + '[prices.mock]\ninput = "2.50"\noutput = "9"\n')
    assert dear.models["mock"].cost is not None
    assert dear.models["mock"].cost.price().rates[Component.CACHE_WRITE] == parse_amount("2.50")
    with pytest.raises(ConfigError, match="is below the cost"):
        read(tmp_path, MOCK + cost + '[prices.mock]\ninput = "2.40"\noutput = "9"\n')


def test_an_engine_gives_embeddings_or_ranks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models.small.reranking: an engine gives embeddings or ranks documents"):
        read(tmp_path, '[models.small]\nengine = "llamacpp"\nreranking = true\nembeddings = "mean"\n')
