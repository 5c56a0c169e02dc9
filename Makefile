# `make demo` shows what regard does, `make test` checks it; both make .venv and install what they need. The others: `make fuzz`
# draws new cases, FUZZ_MINUTES of each kind; `make coverage`; `make test-oldest` runs the tests with the lowest versions
# claimed; `make real` fetches a pretrained model once and runs what is tested on it.
PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13,$(shell command -v python$(version))) python3)
WORKERS ?= 2
FUZZ_MINUTES ?= 1
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check --progress-bar off
INSTALL := $(BIN)/python $(PIP) -c constraints.txt -e
RECENT := -c "import sys; sys.version_info < (3, 11) and sys.exit('regard needs Python 3.11 or later, and this is ' \
  + sys.version.split()[0] + ': make clean, then make PYTHON=/path/to/python3.12')"
# Each worker has one thread, and takes tests from another when it has none left.
PYTEST := -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test lint types fuzz coverage test-oldest real clean

demo: $(VENV)/.demo
	$(BIN)/regard look --out report.html

test: lint types
	@echo "tests and doctests"
	$(BIN)/python $(PYTEST)

lint: $(VENV)/.dev
	@echo "lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	@echo "types"
	$(BIN)/mypy

fuzz: $(VENV)/.dev
	$(BIN)/python -m fuzz --minutes $(FUZZ_MINUTES)

coverage: $(VENV)/.dev
	$(BIN)/python $(PYTEST) --cov --cov-report=term --cov-report=html

test-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python $(PYTEST)

real: $(VENV)/.dev
	$(BIN)/python -m bench.real_model
	$(BIN)/python -m pytest -m real tests/real
	$(BIN)/python -m bench.steering_real --quick
	$(BIN)/python -m bench.cache_real --quick

clean:
	rm -rf $(VENV) $(OLDEST) report.html htmlcov .coverage*

# The build requires nothing of torch, so the constraints keep the one installation of it.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python $(RECENT)
	@echo "installing regard (some minutes at first, then not again)"
	$(INSTALL) ".[hf,report]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python $(RECENT)
	@echo "installing regard and what its tests need (some minutes at first, then not again)"
	$(INSTALL) ".[dev]"
	@touch $@ $(VENV)/.demo

$(OLDEST)/.dev: pyproject.toml constraints-oldest.txt | $(OLDEST)/bin/python
	@echo "installing the lowest versions (some minutes at first, then not again)"
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt -e ".[dev]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) $(RECENT)
	$(PYTHON) -m venv $(VENV)

$(OLDEST)/bin/python:
	@$(PYTHON) $(RECENT)
	$(PYTHON) -m venv $(OLDEST)
