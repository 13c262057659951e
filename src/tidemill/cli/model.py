"""`tidemill model`"""

from cyclopts import App

from tidemill.cli.locate import source
from tidemill.cli.output import grouped, print_json, print_table
from tidemill.cli.place import HERE, Place

app = App(name="model")


@app.command(name="list")
def list_(*, place: Place = HERE) -> None:
    """List the models, how they do, and their prices per million tokens."""
    found = source(place).models()
    if place.json:
        print_json(found)
        return
    rows = []
    for model in found["models"]:
        replicas = f"{model['replicas_ready']} of {model['replicas_total']}"
        head = (model["name"], model["engine"] or "", model["state"], replicas)
        prices = model["prices"] or {"": {"input": "no price", "cached_input": "", "output": ""}}
        for currency, price in prices.items():
            amounts = (grouped(price[kind]) for kind in ("input", "cached_input", "output"))
            rows.append((*head, currency, *amounts))
            head = ("", "", "", "")
    print_table(
        [
            ("Model", "left"),
            ("Engine", "left"),
            ("State", "left"),
            ("Ready", "left"),
            ("", "left"),
            ("Input", "right"),
            ("Cached", "right"),
            ("Output", "right"),
        ],
        rows,
    )
