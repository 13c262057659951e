"""The configuration file: what it says is taken exactly, and what cannot be meant is refused by name."""

import math
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.examples import examples
from tests.support.prices import token_price
from tidemill.app.config.load import load_config
from tidemill.app.config.schema.models import ModelConfig
from tidemill.app.config.schema.platform import (
    EMBEDDED_MODEL,
    BatchConfig,
    Config,
    FilesConfig,
    GatewayConfig,
    default_config,
)
from tidemill.app.config.schema.prices import PriceConfig
from tidemill.errors import ConfigError
from tidemill.ledger.money import parse_amount

MOCK = '[models.mock]\nengine = "openai"\nbase_url = "http://127.0.0.1:9000/v1"\n'
PRICE = '[prices.mock]\ninput = "4.00"\ncached_input = "1.00"\noutput = "16.00"\n'


def read(directory: Path, text: str | bytes) -> Config:
    path = directory / "tidemill.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path)


def refusal(directory: Path, text: str | bytes) -> str:
    """What is said of a file that is refused, without its path, which always comes first."""
    with pytest.raises(ConfigError) as refused:
        read(directory, text)
    said = str(refused.value)
    assert said.startswith(f"{directory / 'tidemill.toml'}: ")
    assert said.rstrip("?.") != said, f"not a sentence: {said}"
    return said.removeprefix(f"{directory / 'tidemill.toml'}: ")


# What is taken


def test_without_a_file_the_embedded_model_runs_at_a_price() -> None:
    config = load_config(None)
    assert config == default_config()
    assert list(config.models) == list(config.prices) == [EMBEDDED_MODEL]


def test_an_empty_file_is_a_platform_without_models(tmp_path: Path) -> None:
    assert read(tmp_path, "") == Config()


def test_the_example_of_the_issue(tmp_path: Path) -> None:
    config = read(tmp_path, MOCK + 'api_key_env = "MOCK_KEY"\n' + PRICE)
    assert config.models["mock"] == ModelConfig(
        engine="openai", base_url="http://127.0.0.1:9000/v1", api_key_env="MOCK_KEY"
    )
    assert config.prices["mock"]["USD"].price() == token_price(4_000_000_000, 1_000_000_000, 16_000_000_000)


def test_an_upstream_with_anthropics_api(tmp_path: Path) -> None:
    claude = '[models.claude]\nengine = "anthropic"\nbase_url = "https://api.anthropic.com/v1"\n'
    model = read(tmp_path, claude + 'upstream_model = "claude-sonnet-4-5"\n').models["claude"]
    assert not model.kind.runs_here and not model.kind.embeds and model.slots is None


def test_prices_of_several_currencies(tmp_path: Path) -> None:
    """`[prices.M]` is in the installation's currency; `[prices.M.CNY]` in the one that it names."""
    eur = '[prices.mock.EUR]\ninput = "0.000000001"\noutput = "2"\n'
    config = read(tmp_path, 'currency = "CNY"\n' + MOCK + PRICE + eur)
    prices = {code: msgspec.structs.asdict(price) for code, price in config.prices["mock"].items()}
    assert {code: price["input"] for code, price in prices.items()} == {"CNY": "4.00", "EUR": "0.000000001"}
    assert config.prices["mock"]["EUR"].price() == token_price(1, 1, 2_000_000_000)  # cached: the price of input
    only = read(tmp_path, 'currency = "CNY"\n' + MOCK + eur)
    assert list(only.prices["mock"]) == ["EUR"]


def test_names_with_dots_and_slashes(tmp_path: Path) -> None:
    name = "org/Qwen2.5-7B:latest"
    config = read(tmp_path, (MOCK + PRICE).replace("mock", f'"{name}"'))
    assert list(config.models) == list(config.prices) == [name]


# What is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # unknown keys, with the nearest right name
        ('curency = "USD"', "unknown key curency. Did you mean currency?"),
        ("zzz = 1", "unknown key zzz. Known keys: currency, timezone"),
        (MOCK + 'base_ulr = "x"', "unknown key models.mock.base_ulr. Did you mean models.mock.base_url?"),
        (MOCK + PRICE + 'imput = "1"', "unknown key prices.mock.imput. Did you mean prices.mock.input?"),
        (
            MOCK + '[prices.mock.CNY]\ninput = "1"\noutptu = "1"',
            "unknown key prices.mock.CNY.outptu. Did you mean prices.mock.CNY.output?",
        ),
        ("[gateway]\ndrain_second = 1", "unknown key gateway.drain_second. Did you mean gateway.drain_seconds?"),
        ('[first_tenant]\nnam = "x"', "unknown key first_tenant.nam. Did you mean first_tenant.name?"),
        ('[store]\nuri = "x"', "unknown key store.uri. Did you mean store.url?"),
        (
            '[models.qwen2.5]\nengine = "openai"',
            'unknown key models.qwen2.5. Quote a name that has a dot: [models."qwen2.5"].',
        ),
        (
            MOCK + '[prices.mock.usd]\ninput = "1"\noutput = "1"',
            "unknown key prices.mock.usd. Did you mean prices.mock.USD?",
        ),
        (
            MOCK + PRICE.replace("mock", "mok"),
            "prices.mok: there is no model of that name. Did you mean [prices.mock]?",
        ),
        (PRICE, "prices.mock: there is no model of that name. Add [models.mock], or remove the price."),
        # bad numbers
        (MOCK + "parallel = 0", "models.mock.parallel must be from 1 to 16777216, not 0."),
        (MOCK + 'parallel = "8"', "models.mock.parallel: expected an integer, got a string."),
        (MOCK + "context = -4096", "models.mock.context must be from 1 to 16777216, not -4096."),
        (MOCK + "threads = 99999", "models.mock.threads must be from 0 to 1024, not 99999."),
        (
            MOCK + "drain_seconds = nan",
            "models.mock.drain_seconds must be more than 0 and at most 86400 seconds",
        ),
        (MOCK + "drain_seconds = 1" + "0" * 400, "models.mock.drain_seconds: "),
        ("[gateway]\ndrain_seconds = -1", "gateway.drain_seconds must be from 0 to 86400 seconds, not -1."),
        (
            "[gateway]\nwrite_timeout_seconds = inf",
            "gateway.write_timeout_seconds must be from 1 to 86400 seconds",
        ),
        ("[gateway]\nmax_connections = 0", "gateway.max_connections must be from 1 to 1000000, not 0."),
        ("[gateway]\nmax_body_mib = 0", "gateway.max_body_mib must be from 1 to 1024, not "),
        ("[gateway]\nmax_body_mib = 1" + "0" * 30, "gateway.max_body_mib must be from 1 to 1024, not "),
        ("x = 1" + "0" * 5000, "is not valid TOML: "),
        # bad amounts
        (
            MOCK + "[prices.mock]\ninput = 4.00\noutput = 1",
            "prices.mock.input: expected a string, got a number. Strings and amounts are written in quotes, such as",
        ),
        (MOCK + PRICE.replace("4.00", "4,00"), "prices.mock: '4,00' is not an amount; write a plain decimal"),
        (MOCK + PRICE.replace("4.00", "-1"), "prices.mock: the price of input must be zero or more"),
        (MOCK + PRICE.replace("4.00", "0.0000000001"), "prices.mock: '0.0000000001' has more than nine decimals"),
        (MOCK + PRICE.replace("4.00", "99999999"), "prices.mock: the price of input is 99999999.00 per million tokens"),
        (MOCK + '[prices.mock]\ninput = "1"', "prices.mock: missing key `output`."),
        (MOCK + 'cost_per_hour = "cheap"', "models.mock.cost_per_hour: 'cheap' is not an amount"),
        (MOCK + 'cost_per_hour = "-1"', "models.mock.cost_per_hour must be zero or more, not -1."),
        ('[first_tenant]\ncredit = "lots"', "first_tenant.credit: 'lots' is not an amount"),
        ('[first_tenant]\ncredit = "-5"', "first_tenant.credit must be zero or more, not -5."),
        # two of one name
        (MOCK + MOCK, "[models.mock] is declared twice (at line 4, column 13)."),
        (MOCK + PRICE + PRICE, "[prices.mock] is declared twice (at line 8, column 13)."),
        (
            MOCK + PRICE + '[prices.mock.USD]\ninput = "1"\noutput = "1"',
            "prices.mock is given twice in USD. Remove [prices.mock.USD].",
        ),
        # not TOML
        ('currency = "USD', "is not valid TOML: "),
        ("[models.mock]\nengine = \n", "is not valid TOML: Invalid value (at line 2, column 10)."),
        ("x = " + "[" * 3000, "is not valid TOML: "),
        (b"currency = '\xff'", "is not UTF-8 text."),
        # what a model needs
        ('[models.m]\nbase_url = "http://x"', "models.m: missing key `engine`."),
        (
            '[models.m]\nengine = "tgi"',
            "models.m.engine: invalid choice 'tgi'. Choose one of: anthropic, llamacpp, openai, sglang, vllm.",
        ),
        ('[models.m]\nengine = "openai"', 'base_url = "http://HOST:PORT/v1"'),
        (
            '[models.m]\nengine = "llamacpp"\nbase_url = "http://x"',
            'models.m.base_url is not supported with engine = "llamacpp", which Tidemill runs itself.',
        ),
        ('[models."a b"]\nengine = "llamacpp"', "models.a b is not a valid model name. Use letters, digits and"),
        (MOCK + 'upstream_model = ""', "models.mock.upstream_model must not be empty."),
        # the rest
        ('currency = "usd"', "currency: 'usd' is not a currency code; write three capital letters"),
        ("currency = ['USD']\n" + MOCK + PRICE, 'currency must be a string. Write currency = "USD".'),
        ('timezone = "Asia/Shangai"', "timezone: 'Asia/Shangai' is not a time zone; did you mean Asia/Shanghai?"),
        ('timezone = "America"', "timezone: 'America' is not a time zone"),
        ('timezone = "a\\u0000b"', "timezone: 'a\\x00b' is not a time zone"),
        (f'timezone = "{"x" * 5000}"', "timezone: "),
        ('[first_tenant]\nname = " "', "first_tenant.name must be 1 to 128 printable characters."),
        (f'issuer = "{"x" * 1001}"', "issuer must be at most 1000 characters long."),
        ("models = 3", "models must be a table of tables. Write [models.NAME]."),
        ("[models]\nmock = 3", "models.mock must be a table. Write [models.mock] and its keys below it."),
        ("[[models]]\nname = 'x'", "models must be a table of tables. Write [models.NAME]."),
        ("prices = [1]", "prices: expected a table, got a list."),
        ("store = 'x'", "store: expected a table, got a string."),
    ],
)
def test_a_mistake_is_refused_by_name(tmp_path: Path, text: str | bytes, says: str) -> None:
    assert says in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x/v1",
        "x:9000",
        "http://",
        "http://x:99999/v1",
        "http://x:port/v1",
        "http://[::1",
        "http://x/ü",
        "http://a b/",
    ],
)
def test_an_address_that_no_client_can_go_to_is_refused_before_a_gateway_starts(tmp_path: Path, url: str) -> None:
    text = MOCK.replace("http://127.0.0.1:9000/v1", url)
    says = f"models.mock.base_url: {url!r} is not a valid address. Write http://HOST:PORT/v1."
    assert says in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "url", ["http://x", "https://api.example.com/v1/", "http://[::1]:9000/v1", "http://u:p@x:1/v1"]
)
def test_an_address_that_a_client_can_go_to_is_taken(tmp_path: Path, url: str) -> None:
    assert read(tmp_path, MOCK.replace("http://127.0.0.1:9000/v1", url)).models["mock"].base_url == url


def test_a_file_that_is_not_there_or_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read \(No such file or directory\)\."):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)\."):
        load_config(tmp_path)


# Whatever is in it


words = st.sampled_from(
    ["mock", "USD", "CNY", "openai", "llamacpp", "4.00", "-1", "", "UTC", "a.b", "x" * 200, "\x00", "ü"]
)
values: Any = st.recursive(
    words
    | st.integers(-(10**30), 10**30)
    | st.sampled_from([0, 1, 8, 4096])
    | st.floats()
    | st.booleans()
    | st.datetimes().map(lambda at: at.replace(microsecond=0)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=4,
)


def table(kind: type) -> Any:
    """A table of some of a struct's keys, or of a wrong one, with values right and wrong."""
    keys = st.sampled_from([*kind.__struct_fields__, "wrong"])  # type: ignore[attr-defined]
    return st.dictionaries(keys, values, max_size=4)


model = table(ModelConfig).map(lambda given: {"engine": "openai", "base_url": "http://x/v1", **given}) | table(
    ModelConfig
)
price = table(PriceConfig).map(lambda given: {"input": "1", "output": "2", **given}) | table(PriceConfig)
documents = st.fixed_dictionaries(
    {},
    optional={
        "currency": st.sampled_from(["USD", "CNY", "usd"]) | values,
        "timezone": st.sampled_from(["UTC", "Asia/Shanghai", "America"]) | values,
        "issuer": values,
        "models": st.dictionaries(words, model | values, max_size=3) | values,
        "prices": st.dictionaries(words, price | st.dictionaries(words, price, max_size=2) | values, max_size=3)
        | values,
        "gateway": table(GatewayConfig) | values,
        "files": table(FilesConfig) | values,
        "batch": table(BatchConfig) | values,
        "first_tenant": values,
        "store": values,
        "wrong": values,
    },
)


def toml(value: Any) -> str:
    """A value as TOML writes it in line."""
    match value:
        case bool():
            return str(value).lower()
        case dict():
            return "{" + ", ".join(f"{toml(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
        case str():
            return '"' + "".join(letter if letter.isalnum() else f"\\u{ord(letter):04x}" for letter in value) + '"'
        case float():
            return (
                "nan" if math.isnan(value) else ("-inf" if value < 0 else "inf") if math.isinf(value) else repr(value)
            )
        case int():
            return str(value)
    return str(value.isoformat(sep=" "))


def taken_or_refused(text: str | bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        try:
            read(Path(directory), text)
        except ConfigError as refused:
            assert str(refused).startswith(directory)


@examples(3)
@given(documents)
@example({"currency": ["USD"], "prices": {"mock": {"input": "1", "output": "1"}}})
@example({"models": {"mock": {"engine": "openai", "base_url": "http://x", "split": {"mock": math.nan}}}})
def test_a_document_is_taken_or_refused_and_never_anything_else(document: dict[str, Any]) -> None:
    taken_or_refused("\n".join(f"{toml(key)} = {toml(value)}" for key, value in document.items()))


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_so_is_rubbish(rubbish: bytes) -> None:
    taken_or_refused(rubbish)


def test_prices_of_devices_and_the_rules_of_jobs(tmp_path: Path) -> None:
    text = """
    currency = "CNY"
    [device_prices.h800-sxm]
    hour = "16"
    [device_prices.h800-sxm.USD]
    hour = "2.20"
    preemptible_hour = "1"
    [jobs]
    tenants = true
    """
    config = read(tmp_path, text)
    by_currency = {code: price.hours() for code, price in config.device_prices["h800-sxm"].items()}
    assert {code: list(hours.values()) for code, hours in by_currency.items()} == {
        "CNY": [parse_amount("16"), parse_amount("8")],
        "USD": [parse_amount("2.20"), parse_amount("1")],
    }
    assert config.jobs.tenants


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[device_prices.cpu]\nhour = "-1"', "device_prices.cpu: -1.00 per hour is not a valid price"),
        ("[device_prices.cpu]\nhour = 1", "device_prices.cpu.hour: expected a string"),
        (
            '[device_prices.cpu]\nhours = "1"',
            "unknown key device_prices.cpu.hours. Did you mean device_prices.cpu.hour?",
        ),
        (
            '[device_prices.cpu]\nhour = "1"\n[device_prices.cpu.USD]\nhour = "1"',
            "device_prices.cpu is given twice in USD",
        ),
        ('[device_prices."a b"]\nhour = "1"', "device_prices.a b is not a valid kind of device"),
        ("device_prices = 1", "device_prices: expected a table"),
        ("[jobs]\ngrace_seconds = 700", "jobs.grace_seconds must be from 0 to 600, not 700."),
        ("[jobs]\ntenant = true", "unknown key jobs.tenant. Did you mean jobs.tenants?"),
    ],
)
def test_mistakes_about_jobs(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(tmp_path, text)
