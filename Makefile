PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION = 1
export OMP_WAIT_POLICY = PASSIVE
# Empty is unset: what is imported is compiled once, and not again in each of a hundred processes that tests start.
export PYTHONDONTWRITEBYTECODE =

.PHONY: run test check format lint types advisories kernel clean

run: $(READY)  ## set up, then run the quickstart study
	$(BIN)/fedlth run configs/quickstart.yaml

test: $(READY) kernel  ## set up, then run every test, a file in one process: two, since tests of engines have time limits
	$(BIN)/python -m pytest -q -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY) lint  ## what CI runs; mypy takes one core, and so does compiling the kernel
	$(MAKE) -j 2 advisories test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

advisories: types  ## known vulnerabilities of what is pinned
	$(BIN)/python .ci/advisories.py

kernel: $(READY)  ## compile the kernel where it is not yet; else both processes of the tests would
	$(BIN)/python -c "from fedlth.kernel import kernel; kernel.warm()"

# Not compiled: pip would do it with every file, and a third of them is ever imported.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev,fast,sim]"
	touch $(READY)

clean:
	rm -rf $(VENV)
