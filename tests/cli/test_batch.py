"""`tidemill batch` as an operator uses it; a tenant's developer does so in tests/e2e/test_batch_command.py."""

from datetime import UTC, datetime

from tests.cli.conftest import Run, Up
from tests.control.test_batches import make
from tidemill.store.batches import LineError, fail_batch


def test_batches_are_listed_shown_and_cancelled(run: Run, up: Up) -> None:
    tenant = run("tenant", "create", "acme", "--data", up.data, "--json").json
    first, second = (make(up.platform, tenant["id"], name, minute=at) for at, name in enumerate(("one", "two")))
    with up.platform.store.write() as connection:
        errors = [LineError("invalid_url", "It is elsewhere.", "url", line) for line in range(1, 31)]
        fail_batch(connection, first, errors, datetime.now(UTC))
    table = run("batch", "list", "--tenant", "acme", "--data", up.data).out
    assert table.index(second) < table.index(first) and "validating" in table and "failed" in table
    only = run("batch", "list", "--open", "--data", up.data, "--json").json
    assert [each["id"] for each in only["batches"]] == [second]
    limited = run("batch", "list", "--limit", "1", "--data", up.data)
    assert first not in limited.out and "there are more" in limited.err
    shown = run("batch", "show", first, "--data", up.data).out
    assert "line 1: It is elsewhere. (invalid_url)" in shown and "and 10 more; see --json" in shown
    assert "Charge    0.00 USD" in shown
    assert run("batch", "cancel", second, "--data", up.data).out == f"Batch {second} of acme is cancelling.\n"
    complaint = run("batch", "cancel", first, "--data", up.data).complaint
    assert complaint.startswith("Cannot cancel a batch with status 'failed'.")
    assert run("batch", "show", "batch_no", "--data", up.data).complaint.startswith("There is no batch 'batch_no'.")


def test_a_stopped_platforms_batches_can_be_read(run: Run, up: Up, data: object) -> None:
    tenant = run("tenant", "create", "acme", "--data", up.data, "--json").json
    batch = make(up.platform, tenant["id"], "one")
    from tidemill.cli.offline import OfflinePlatform

    stopped = OfflinePlatform(up.data)
    assert [each["id"] for each in stopped.batches(None, unfinished=True, limit=10)["batches"]] == [batch]
    assert stopped.batch(batch)["status"] == "validating"


def test_what_a_tenants_commands_need(run: Run, up: Up, tmp_path: object) -> None:
    place = ("--data", up.data)
    assert run("batch", "submit", "x.jsonl", *place).code == 2, "a key"
    missing = run("batch", "submit", "x.jsonl", "--key", "sk-tm-1", "--url", up.url, *place)
    assert missing.complaint == "x.jsonl cannot be read: No such file or directory."
    elsewhere = run("batch", "results", "batch_1", "--key", "sk-tm-1", "--control-url", up.url)
    assert elsewhere.complaint == "The address of the data plane is not known. Give it with --url."
    wrong = run("batch", "results", "batch_1", "--key", "sk-tm-1", "--url", "nonsense", *place)
    assert "'nonsense' is not the address of a data plane." in wrong.complaint
    other = run("batch", "results", "batch_1", "--key", "sk-tm-1", "--url", up.url + "/v1", *place)
    assert other.complaint == "There is no GET /v1/batches/batch_1.", "the control plane's port"
    nobody = run("batch", "results", "b", "--key", "sk-tm-1", "--url", "http://127.0.0.1:1/v1", *place)
    assert "does not answer" in nobody.complaint
