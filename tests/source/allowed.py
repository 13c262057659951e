"""What the rules of this folder do not ask yet. These lists may only get shorter: an entry that is no longer needed
fails its test, and nobody adds one."""

LONG_FILES = {
    "fleet/shim.py": "it runs alone and must not import anything of the product",
}

LONG_FUNCTIONS = {
    ("app/worker.py", "serve"): "the composition of a gateway process, in order",
    ("cli/job.py", "submit"): "a parameter for each flag",
}

TWICE: dict[str, str] = {}
"""Constants that are defined in several files."""

PARTICIPLES = {
    "ledger/costing.py": "cost accounting's word",
    "ledger/posting.py": "double entry's word",
    "ledger/pricing.py": "the field's word",
    "tides/routing.py": "the field's word",
    "tides/serving.py": "model serving",
    "work/jobs/billing.py": "the field's word",
}
"""Files that end in -ing or -ed and are nouns all the same."""

LONG_FIRST_LINES = 62
"""Docstrings whose first line is longer than 100 characters."""
