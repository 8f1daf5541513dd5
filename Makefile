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

test: $(READY)  ## set up, then run every test, a file in one process: two, since tests of engines have time limits
	$(BIN)/python -m pytest -q -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY) lint types test  ## what CI runs

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

# Compiled after the installs, on every core: pip would do it file by file. A few templates are no Python of today.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev,fast,sim]"
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1
	touch $(READY)

clean:
	rm -rf $(VENV)
