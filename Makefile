# make demo   train a toy guard and measure it (sets everything up by itself)
# make test   the tests (likewise)
# make contracts   the guard behind a real LiteLLM proxy (installs 750 MB apart)
# make docs   the pages of docs/ as a site, in site/ (installs its tools first)
# make lint   ruff; make check: ruff, formatting and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := mllm_protector scripts tests docs

CONTRACTS := .venv-contracts

.PHONY: demo test slow contracts docs lint check clean

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

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)

# With the site, where its tools are installed.
check: lint $(if $(wildcard $(VENV)/.installed-docs),docs)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(CONTRACTS) build dist site *.egg-info

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

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

# LiteLLM's pins and ours exclude each other.
$(CONTRACTS)/.installed: tests/serving/gateways/requirements.txt
	$(PYTHON) -m venv $(CONTRACTS)
	$(CONTRACTS)/bin/python -m pip install --quiet --requirement $<
	@touch $@
