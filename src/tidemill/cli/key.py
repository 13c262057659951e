"""`tidemill key`"""

from cyclopts import App

from tidemill.cli.locate import running, source
from tidemill.cli.output import complain, moment, print_json, print_table, print_text
from tidemill.cli.place import HERE, Place

app = App(name="key")


@app.command
def create(*, tenant: str, name: str = "default", place: Place = HERE) -> None:
    """Make an API key and print it, once: only its digest is kept.

    Parameters
    ----------
    tenant
        The tenant's name or id.
    name
        To tell the key from the tenant's others.
    """
    made = running(place).create_key(tenant, name)
    if place.json:
        print_json(made)
        return
    print_text(made["key"])
    complain(f"keep it: it will not be shown again. To revoke it: tidemill key revoke {made['id']}", kind="note")


@app.command(name="list")
def list_(*, tenant: str | None = None, place: Place = HERE) -> None:
    """List the API keys, revoked ones included.

    Parameters
    ----------
    tenant
        Only this tenant's.
    """
    found = source(place).keys(tenant)
    if place.json:
        print_json(found)
        return
    print_table(
        [(title, "left") for title in ("Key", "Tenant", "Name", "Id", "Made (UTC)", "Revoked (UTC)")],
        [
            (
                each["hint"],
                each["tenant"],
                each["name"],
                each["id"],
                moment(each["created_at"]),
                moment(each["revoked_at"]),
            )
            for each in found["keys"]
        ],
    )


@app.command
def revoke(key: str, /, *, place: Place = HERE) -> None:
    """Revoke an API key, at once and for good.

    Parameters
    ----------
    key
        The key itself, or its id from `tidemill key list`.
    """
    revoked = running(place).revoke_key(key)
    if place.json:
        print_json(revoked)
        return
    print_text(f"Key {revoked['hint']} of {revoked['tenant']} is revoked ({revoked['id']}).")
