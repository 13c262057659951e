"""What the configuration says of routing, and how it is refused."""

from pathlib import Path

import pytest

from tests.support.prices import token_price
from tidemill.app.config.load import load_config
from tidemill.app.config.schema.models import ModelConfig
from tidemill.app.config.schema.platform import Config
from tidemill.app.datadir import DataDir
from tidemill.app.fleet import Fleet
from tidemill.errors import ConfigError
from tidemill.gateway.routing.models import ModelCost

X = '[models.x]\nengine = "openai"\nbase_url = "http://x/v1"\n'
Y = '[models.y]\nengine = "openai"\nbase_url = "http://y/v1"\n'
Y_COST = '[models.y.cost]\ninput = "1"\noutput = "2"\n'
OWN_Y = Y + 'on_disconnect = "abort"\n'
LOCAL = '[models.l]\nengine = "llamacpp"\n'


def read(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "tidemill.toml"
    path.write_text(text)
    return load_config(path)


def test_what_is_taken(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        X
        + 'aliases = ["x-latest", "gpt-4o"]\nfallbacks = ["y"]\noverflow = true\nprobe_seconds = 0\n'
        + "[models.x.split]\ny = 2.5\n"
        + '[prices.x]\ninput = "4"\noutput = "8"\n'
        + '[models.y]\nengine = "openai"\nbase_urls = ["http://a/v1", "http://b/v1"]\n'
        + Y_COST
        + LOCAL
        + "replicas = 3\nhedge_seconds = 1.5\n",
    )
    fleet = Fleet(config, tmp_path, DataDir(tmp_path / "data"), lambda: None)
    x, y, local = fleet.specs()
    assert (x.aliases, x.fallbacks, x.overflow, x.split) == (("x-latest", "gpt-4o"), ("y",), True, (("y", 2.5),))
    assert x.cost is None and x.slots is None
    assert [(each.name, each.base_url, each.ready) for each in y.replicas] == [
        ("y/0", "http://a/v1", True),
        ("y/1", "http://b/v1", True),
    ]
    assert y.cost == ModelCost("USD", token_price(1_000_000_000, 1_000_000_000, 2_000_000_000))
    assert [(each.name, each.ready) for each in local.replicas] == [("l/0", False), ("l/1", False), ("l/2", False)]
    assert local.slots == 8
    assert (x.hedge_seconds, local.hedge_seconds) == (None, 1.5)


def test_an_upstream_with_anthropics_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAUDE_KEY", "sk-ant")
    claude = X.replace("openai", "anthropic") + 'api_key_env = "CLAUDE_KEY"\nupstream_model = "claude-sonnet-4-5"\n'
    fleet = Fleet(read(tmp_path, claude), tmp_path, DataDir(tmp_path / "data"), lambda: None)
    (spec,) = fleet.specs()
    assert (spec.engine, spec.api_key, spec.owned, spec.embeds) == ("anthropic", "sk-ant", False, False)
    assert (spec.upstream_model, spec.replicas[0].base_url) == ("claude-sonnet-4-5", "http://x/v1")
    probe = fleet.upstreams["x/0"]
    assert probe._headers == {"x-api-key": "sk-ant", "anthropic-version": "2023-06-01"}
    assert [each.path for each in probe._probes] == [b"/models?limit=1"]
    sold_at_a_loss = X + 'fallbacks = ["y"]\n' + Y.replace("openai", "anthropic")
    with pytest.raises(ConfigError, match="might be sold at a loss"):
        read(tmp_path, sold_at_a_loss)


def test_a_cost_of_nothing_is_none(tmp_path: Path) -> None:
    """It is covered in every currency."""
    config = read(tmp_path, Y + '[models.y.cost]\ninput = "0"\noutput = "0"\n')
    (y,) = Fleet(config, tmp_path, DataDir(tmp_path / "data"), lambda: None).specs()
    assert y.cost is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (X + "hedge_seconds = 1\n", ["models.x.hedge_seconds", "would bill both", 'on_disconnect = "abort"']),
        (LOCAL + "hedge_seconds = 0\n", ["models.l.hedge_seconds", "0.01 to 3600"]),
        (LOCAL + "replicas = 0\n", ["models.l.replicas must be from 1 to 64, not 0"]),
        (LOCAL + "replicas = 65\n", ["models.l.replicas must be from 1 to 64, not 65"]),
        (LOCAL + 'replicas = "two"\n', ["models.l.replicas", "integer"]),
        (LOCAL + "replica = 2\n", ["unknown key models.l.replica", "models.l.replicas?"]),
        (LOCAL + 'base_urls = ["http://x/v1"]\n', ["models.l.base_urls", "which Tidemill runs itself"]),
        (LOCAL + '[models.l.cost]\ninput = "1"\noutput = "1"\n', ["models.l.cost", "cost_per_hour"]),
        (X + "replicas = 2\n", ["models.x.replicas", "base_urls = ["]),
        (X + 'base_urls = ["http://y/v1"]\n', ["models.x", "both base_url and base_urls"]),
        ('[models.x]\nengine = "openai"\n', ["models.x.base_url is missing"]),
        ('[models.x]\nengine = "openai"\nbase_urls = []\n', ["models.x.base_url is missing"]),
        ('[models.x]\nengine = "openai"\nbase_urls = ["ftp://y"]\n', ["models.x.base_urls", "'ftp://y'"]),
        (
            '[models.x]\nengine = "openai"\nbase_urls = ["http://y/v1", "http://y/v1/"]\n',
            ["models.x.base_urls", "twice"],
        ),
        ('[models.x]\nengine = "openai"\nbase_urls = "http://y/v1"\n', ["models.x.base_urls", "a list"]),
        (X + "probe_seconds = 0.1\n", ["models.x.probe_seconds", "from 1 to 3600"]),
        (X + 'aliases = ["a b"]\n', ["models.x.aliases", "'a b' is not a valid model name"]),
        (X + 'aliases = ["a", "a"]\n', ["models.x.aliases", "'a' is listed twice"]),
        (X + 'aliases = ["x"]\n', ["models.x.aliases", "'x' is already the name of a model"]),
        (X + 'aliases = ["a"]\n' + Y + 'aliases = ["a"]\n', ["models.y.aliases", "already an alias of 'x'"]),
        (X + 'aliases = ["a"]\n[prices.a]\ninput = "1"\noutput = "1"\n', ["prices.a", "alias", "price of 'x'"]),
        (X + 'fallbacks = ["z"]\n', ["models.x.fallbacks", "no model 'z'"]),
        (X + 'fallbacks = ["yy"]\n' + OWN_Y, ["models.x.fallbacks", "Did you mean 'y'?"]),
        (X + 'fallbacks = ["x"]\n', ["models.x.fallbacks", "cannot name itself"]),
        (X + 'fallbacks = ["y", "y"]\n' + OWN_Y, ["models.x.fallbacks", "twice"]),
        (X + 'fallbacks = ["y"]\n' + Y, ["models.x.fallbacks", "the cost of 'y' is not known", "[models.y.cost]"]),
        (X + "overflow = true\n", ["models.x.overflow", "needs models to send requests to"]),
        (X + "[models.x.split]\nz = 10\n", ["models.x.split", "no model 'z'"]),
        (X + "[models.x.split]\ny = 0\n" + OWN_Y, ["models.x.split.y", "percentage"]),
        (X + "[models.x.split]\ny = 101\n" + OWN_Y, ["models.x.split.y", "percentage"]),
        (X + '[models.x.split]\ny = "10"\n' + OWN_Y, ["models.x.split"]),
        (X + "[models.x.split]\ny = 10\n" + Y, ["models.x.split", "the cost of 'y' is not known"]),
        (
            X + "[models.x.split]\ny = 10\n" + OWN_Y + "[models.y.split]\nx = 5\n",
            ["models.x.split", "'y' has a split of its own"],
        ),
        (
            X + '[models.x.split]\ny = 60\nz = 60\n[models.z]\nengine = "openai"\nbase_url = "http://z"\n'
            'on_disconnect = "abort"\n' + OWN_Y,
            ["models.x.split", "more than 100 percent"],
        ),
        (Y + '[models.y.cost]\ninput = "1"\n', ["models.y.cost", "output"]),
        (Y + '[models.y.cost]\ninput = "1"\noutptu = "1"\n', ["unknown key models.y.cost.outptu", "output?"]),
        (Y + '[models.y.cost]\ninput = "one"\noutput = "1"\n', ["models.y.cost", "'one' is not an amount"]),
        (Y + '[models.y.cost]\ninput = "-1"\noutput = "1"\n', ["models.y.cost", "must be zero or more"]),
        (Y + '[models.y.cots]\ninput = "1"\n', ["unknown key models.y.cots", "models.y.cost?"]),
        (Y + 'cost = "1"\n', ["models.y.cost"]),
        (
            Y + Y_COST + '[prices.y]\ninput = "1"\noutput = "1.99"\n',
            ["prices.y", "is below the cost in [models.y.cost]", "allow_loss = true"],
        ),
        (
            Y + Y_COST + '[prices.y]\ninput = "5"\ncached_input = "0.5"\noutput = "9"\n',
            ["prices.y", "Each of input, cached_input and output must cover"],
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, text)
    for each in words:
        assert each in str(refused.value), str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        X + 'fallbacks = ["y"]\n' + OWN_Y,
        X + 'fallbacks = ["y"]\n' + Y + Y_COST,
        X + 'fallbacks = ["y"]\nallow_loss = true\n' + Y,
        X + 'fallbacks = ["l"]\n' + LOCAL,
        Y + "allow_loss = true\n" + Y_COST + '[prices.y]\ninput = "0.1"\noutput = "0.1"\n',
        Y + Y_COST + '[prices.y.CNY]\ninput = "0.1"\noutput = "0.1"\n',
        X + "[models.x.split]\ny = 33.3\nl = 66.7\n" + OWN_Y + LOCAL,
    ],
)
def test_what_is_meant_is_taken(tmp_path: Path, text: str) -> None:
    read(tmp_path, text)


def test_the_defaults_change_nothing() -> None:
    model = ModelConfig(engine="llamacpp")
    assert (model.replicas, model.fallbacks, model.split, model.allow_loss) == (1, (), {}, False)
