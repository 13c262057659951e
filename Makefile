# make up     set up and run the platform on its embedded engine and SQLite
# make test   set up and run all tests
# make test-fast  those that need neither a platform nor PostgreSQL, in a minute or two
# make check  formatting, lint, types and import rules
# make bench-gateway
# make bench-ledger  what the loader costs a usage record
# make bench-routing
# make bench-tides
# make bench-tides-sim
# make soak  a thousand open streams for five minutes, and the memory of the gateway
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.tidemill-installed
ALL_STAMP := $(VENV)/.tidemill-all-installed
UV_VERSION := 0.13.9
ARGS ?=
# Tests wait more than they work; those of one file may share a platform.
WORKERS ?= 4
PARALLEL = -n $(WORKERS) --dist loadfile
FAST = not platform and not processes and not postgres and not slow
FAST_PATHS = --ignore tests/e2e --ignore tests/field --ignore tests/crash

.PHONY: up test test-fast check format demo bench-gateway bench-ledger bench-routing bench-tides bench-tides-sim soak lock clean

up: $(STAMP)
	@exec $(BIN)/tidemill up $(ARGS)

test: $(ALL_STAMP)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-fast: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) --hypothesis-profile=fast -m "$(FAST)" $(FAST_PATHS) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix -q . || true
	$(BIN)/ruff format -q .

demo: $(STAMP)
	@exec $(BIN)/tidemill demo $(ARGS)

bench-gateway: $(STAMP)
	$(BIN)/python bench/gateway.py $(ARGS)

bench-ledger: $(ALL_STAMP)
	$(BIN)/python bench/ledger.py $(ARGS)

bench-routing: $(STAMP)
	$(BIN)/python bench/routing.py $(ARGS)

soak: $(STAMP)
	$(BIN)/python bench/soak.py $(ARGS)

bench-tides: $(STAMP)
	$(BIN)/python bench/tides.py $(ARGS)

bench-tides-sim: $(STAMP)
	$(BIN)/python bench/tides_sim.py $(ARGS)

define install_locked
$(BIN)/uv export -q --frozen --all-groups --all-extras $(1) --no-emit-project -o $(VENV)/requirements.txt >/dev/null && \
$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --no-deps --require-hashes \
  -r $(VENV)/requirements.txt | sed -un 's/^Collecting \([^ ]*\).*/  \1/p'
endef

# The lock names versions and hashes; which index they come from is pip's own configuration, so that a mirror or an
# air-gapped site works as it is set up.
$(STAMP): pyproject.toml uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Tidemill needs Python 3.11 or newer; run: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || { echo "· making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "· installing the locked dependencies (about 200 MB, most of it the embedded engine and its model)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --progress-bar off "uv==$(UV_VERSION)"
	@$(call install_locked,--no-extra ray)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

# The tests also need what a single machine does not: Ray.
$(ALL_STAMP): $(STAMP)
	@echo "· installing what only the tests need"
	@$(call install_locked,)
	@touch $(ALL_STAMP)

lock: $(STAMP)
	$(BIN)/uv lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
