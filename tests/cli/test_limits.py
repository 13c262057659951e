"""`tidemill limit`, and what `key` and `tenant` have to do with limits."""

import json

from tests.cli.conftest import Run, Up


def test_limits_are_set_listed_and_removed(run: Run, up: Up) -> None:
    run("tenant", "create", "acme", "--data", up.data)
    done = run("limit", "set", "--tenant", "acme", "--rpm", "100", "--budget", "100", "--soft", "80", "--data", up.data)
    assert done.code == 0, done.err
    first, second = done.out.splitlines()
    assert first.startswith("acme has 100 requests per minute (lim_")
    assert second.startswith("acme has a budget of 100.00 USD per month, with a warning at 80% (lim_")
    run("limit", "set", "--tenant", "acme", "--model", "big", "--concurrency", "4", "--data", up.data)
    table = run("limit", "list", "--data", up.data).out
    assert "4 concurrent requests" in table and "big" in table and "Next period (UTC)" in table
    found = run("limit", "list", "--tenant", "acme", "--data", up.data, "--json").json["limits"]
    assert [each["kind"] for each in found] == ["budget", "rpm", "concurrency"]
    removed = run("limit", "remove", found[2]["id"], "--data", up.data)
    assert removed.out == "acme for big no longer has 4 concurrent requests.\n"
    assert run("limit", "remove", found[2]["id"], "--data", up.data).complaint.startswith("There is no limit 'lim_")


def test_errors_say_what_was_meant(run: Run, up: Up) -> None:
    run("tenant", "create", "acme", "--data", up.data)
    assert run("limit", "set", "--tenant", "acme", "--data", up.data).complaint == (
        "No limit was given. Give rpm, tpm, concurrency or budget."
    )
    assert (
        "Did you mean 'big'?"
        in run("limit", "set", "--tenant", "acme", "--rpm", "1", "--model", "bigg", "--data", up.data).complaint
    )
    assert (
        "Did you mean 'month'?"
        in run("limit", "set", "--tenant", "acme", "--budget", "1", "--per", "months", "--data", up.data).complaint
    )
    assert run("limit", "sett", "--data", up.data).code == 2
    assert run("limit", "set", "--tenant", "acme", "--rpm", "many", "--data", up.data).code == 2


def test_keys_that_are_bound_and_rotated(run: Run, up: Up) -> None:
    run("tenant", "create", "acme", "--data", up.data)
    place = ("--data", up.data)
    made = run(
        "key",
        "create",
        "--tenant",
        "acme",
        "--expires",
        "90d",
        "--models",
        "big, mock",
        "--ips",
        "10.0.0.0/8",
        *place,
        "--json",
    ).json
    assert (made["models"], made["ips"]) == (["big", "mock"], ["10.0.0.0/8"])
    rotated = run("key", "rotate", made["id"], "--overlap", "1h", *place)
    assert rotated.code == 0 and rotated.out.startswith("sk-tm-")
    assert "The old key sk-tm-..." in rotated.err and "works until 20" in rotated.err
    assert made["key"] not in rotated.out + rotated.err
    table = run("key", "list", *place).out
    assert table.count("big, mock, 10.0.0.0/8") == 2
    unbound = json.loads(run("key", "create", "--tenant", "acme", *place, "--json").out)
    assert (unbound["models"], unbound["ips"], unbound["expires_at"]) == ([], [], None)


def test_a_weight(run: Run, up: Up) -> None:
    run("tenant", "create", "acme", "--data", up.data)
    assert run("tenant", "weight", "acme", "3", "--data", up.data).out == "Tenant acme has weight 3.\n"
    assert "weight must be from 1 to 1000" in run("tenant", "weight", "acme", "0", "--data", up.data).complaint
