PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export OMP_WAIT_POLICY = PASSIVE

.PHONY: run test check format lint types clean

run: $(READY)  ## set up, then run the quickstart study
	$(BIN)/fedlth run configs/quickstart.yaml

test: $(READY)  ## set up, then run every test, a file in one process: three, as tests of engines wait a lot
	$(BIN)/python -m pytest -q -m "not long" -n 3 --dist loadfile --no-loadscope-reorder

check: $(READY) lint types test  ## what CI runs

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

# Not compiled at once: of 1.7 GB of packages a run imports a small part, and compiles that when it does.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev,fast,sim]"
	touch $(READY)

clean:
	rm -rf $(VENV)
