"""`tidemill model`"""

import time
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from tidemill.cli.locate import running, source
from tidemill.cli.output import Justify, complain, grouped, print_json, print_table, print_text
from tidemill.cli.target import HERE, Target
from tidemill.errors import Conflict

app = App(name="model")

_LOOK_EVERY_S = 0.3
_TOKENS = ("input", "cached_input", "output")


@app.command(name="list")
def list_(*, target: Target = HERE) -> None:
    """List the models, their state, and their prices per million tokens."""
    found = source(target).models()
    if target.json:
        print_json(found)
        return
    rows = []
    for model in found["models"]:
        replicas = f"{model['replicas_ready']} of {model['replicas_total']}"
        head = (model["name"], model["engine"] or "", model["state"], replicas)
        prices = model["prices"] or {"": {"input": "no price", "cached_input": "", "output": ""}}
        for currency, price in prices.items():
            amounts = (grouped(price[key]) for key in _TOKENS)
            others = ", ".join(f"{key} {grouped(amount)}" for key, amount in price.items() if key not in _TOKENS)
            rows.append((*head, currency, *amounts, others))
            head = ("", "", "", "")
    further = any(row[-1] for row in rows)
    columns: list[tuple[str, Justify]] = [
        ("Model", "left"),
        ("Engine", "left"),
        ("State", "left"),
        ("Ready", "left"),
        ("", "left"),
        ("Input", "right"),
        ("Cached", "right"),
        ("Output", "right"),
        ("Others", "left"),
    ]
    print_table(columns if further else columns[:-1], rows if further else [row[:-1] for row in rows])


@app.command
def roll(
    name: str,
    *,
    path: str,
    version: str = "",
    wait: Annotated[bool, Parameter(negative="--no-wait")] = True,
    target: Target = HERE,
) -> None:
    """Roll a model to other weights, replica by replica, without failing a request.

    A version that does not start is rolled back. The new version survives restarts, until the configuration changes.

    Parameters
    ----------
    name
        The model.
    path
        A GGUF file for llamacpp; for vllm and sglang a folder, or a name on a hub.
    version
        Name of the version. [default: the file's name]
    wait
        Wait until the roll has finished.
    """
    client = running(target)
    given = Path(path).expanduser()
    state = client.roll(name, str(given.absolute()) if given.exists() else path, version)
    said = -1
    while wait and state["ended_at"] is None:
        if state["done"] != said and not target.json:
            said = state["done"]
            complain(f"{name}: {said} of {state['of']} replicas run {state['version']}", kind="note")
        time.sleep(_LOOK_EVERY_S)
        state = next(each for each in client.rolls()["rolls"] if each["model"] == name)
    if target.json:
        print_json(state)
    elif state["ended_at"] is None:
        print_text(f"{name} is being rolled to {state['version']}; `tidemill fleet list` shows its replicas.")
    elif state["state"] == "done":
        print_text(f"{name} runs {state['version']}.")
    if state["ended_at"] is not None and state["state"] != "done":
        raise Conflict(f"{name} was not rolled: {state['why']}.", hint=f"Now: {state['state']}.")


_Json = Annotated[bool, Parameter(negative="")]


@app.command
def fit(
    model: str,
    *,
    nodes: str,
    context: str | None = None,
    concurrency: int = 16,
    precision: str | None = None,
    kv_precision: str = "bf16",
    engine: str = "vllm",
    all_: Annotated[bool, Parameter(name="--all", negative="")] = False,
    json: _Json = False,
) -> None:
    """Show which layouts of a model fit on which nodes, and the arithmetic. Needs no platform.

    Parameters
    ----------
    model:
        A model of the catalogue, such as `deepseek-r1` or `Qwen/Qwen3-32B`.
    nodes:
        `2x8xH800` is two nodes of eight H800 each; separate several kinds by commas.
    context:
        Tokens per sequence, prompt and answer together, such as `32k`. [default: 8k]
    concurrency:
        Concurrent sequences per replica.
    precision:
        Precision of the weights: bf16, fp8, int8, int4, mxfp4. [default: the maker's own, else bf16]
    kv_precision:
        Precision of the KV cache: bf16 or fp8.
    engine:
        Engine to show the launch command of: vllm or sglang.
    all_:
        Also show layouts that do not fit.
    json:
        Print exactly one JSON document.
    """
    from tidemill.cli.model_fit import show_fit

    show_fit(
        model,
        nodes,
        context=context,
        concurrency=concurrency,
        precision=precision,
        kv=kv_precision,
        engine=engine,
        everything=all_,
        json=json,
    )


@app.command
def catalogue(*, gpus: Annotated[bool, Parameter(negative="")] = False, json: _Json = False) -> None:
    """List the models that `tidemill model fit` knows. Needs no platform.

    Parameters
    ----------
    gpus:
        List the kinds of devices instead.
    json:
        Print exactly one JSON document.
    """
    from tidemill.cli.model_fit import show_gpus, show_models

    (show_gpus if gpus else show_models)(json=json)
