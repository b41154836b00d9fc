# make demo   train a toy guard and measure it (sets everything up by itself)
# make test   the tests (likewise)
# make contracts   the guard behind a real LiteLLM proxy (installs 750 MB apart)
# make lint   ruff; make check: ruff, formatting and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := mllm_protector scripts tests

CONTRACTS := .venv-contracts

.PHONY: demo test slow contracts lint check clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/train_detector.py
	$(BIN)/python scripts/train_detoxifier.py
	$(BIN)/python scripts/eval_mmsafety.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

slow: $(VENV)/.installed-dev $(CONTRACTS)/.installed
	$(BIN)/python -m pytest -m slow

contracts: $(VENV)/.installed-dev $(CONTRACTS)/.installed
	$(BIN)/python -m pytest -m slow tests/serving/gateways

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)

check: lint
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(CONTRACTS) build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[serve]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# LiteLLM's pins and ours exclude each other.
$(CONTRACTS)/.installed: tests/serving/gateways/requirements.txt
	$(PYTHON) -m venv $(CONTRACTS)
	$(CONTRACTS)/bin/python -m pip install --quiet --requirement $<
	@touch $@
