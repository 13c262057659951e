"""`tidemill key`"""

from cyclopts import App

from tidemill.cli.locate import running, source
from tidemill.cli.output import complain, moment, print_json, print_table, print_text, split_list
from tidemill.cli.target import HERE, Target

app = App(name="key")


@app.command
def create(
    *,
    tenant: str,
    name: str = "default",
    expires: str | None = None,
    models: str = "",
    ips: str = "",
    target: Target = HERE,
) -> None:
    """Create an API key and print it once: only its digest is stored.

    Parameters
    ----------
    tenant
        The tenant's name or id.
    name
        Name of the key, to tell it from the tenant's others.
    expires
        When it expires: 90d, 24h, a day such as 2027-01-31 (to its end), or an instant. [default: never]
    models
        Allowed models, separated by commas. [default: all]
    ips
        Allowed networks, separated by commas: 10.1.0.0/16,192.0.2.7. [default: any]
    """
    policy = {"expires": expires, "models": split_list(models), "ips": split_list(ips)}
    made = running(target).create_key(tenant, name, **{each: value for each, value in policy.items() if value})
    if target.json:
        print_json(made)
        return
    print_text(made["key"])
    complain(f"keep it: it will not be shown again. To revoke it: tidemill key revoke {made['id']}", kind="note")


@app.command(name="list")
def list_(*, tenant: str | None = None, target: Target = HERE) -> None:
    """List the API keys, revoked ones included.

    Parameters
    ----------
    tenant
        Only this tenant's.
    """
    found = source(target).keys(tenant)
    if target.json:
        print_json(found)
        return
    print_table(
        [(title, "left") for title in ("Key", "Tenant", "Name", "Id", "Made (UTC)", "Ends (UTC)", "Only")],
        [
            (
                each["hint"],
                each["tenant"],
                each["name"],
                each["id"],
                moment(each["created_at"]),
                f"{moment(each['revoked_at'])} revoked" if each["revoked_at"] else moment(each["expires_at"]),
                ", ".join([*each["models"], *each["ips"]]),
            )
            for each in found["keys"]
        ],
    )


@app.command
def rotate(key: str, /, *, overlap: str = "24h", target: Target = HERE) -> None:
    """Replace an API key: print a new one with its policies and limits, and let the old one expire.

    Parameters
    ----------
    key
        The key itself, or its id from `tidemill key list`.
    overlap
        How long the old key keeps working: 24h, 7d, 0s.
    """
    made = running(target).rotate_key(key, overlap)
    if target.json:
        print_json(made)
        return
    print_text(made["key"])
    old = made["replaces"]
    complain(
        f"keep it: it will not be shown again. The old key {old['hint']} works until {moment(old['expires_at'])} UTC.",
        kind="note",
    )


@app.command
def revoke(key: str, /, *, target: Target = HERE) -> None:
    """Revoke an API key, immediately and permanently.

    Parameters
    ----------
    key
        The key itself, or its id from `tidemill key list`.
    """
    revoked = running(target).revoke_key(key)
    if target.json:
        print_json(revoked)
        return
    print_text(f"Key {revoked['hint']} of {revoked['tenant']} is revoked ({revoked['id']}).")
