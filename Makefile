# `make` sets up, runs the pipeline and shows the results; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := all
export UV_SYSTEM_CERTS := 1
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export GOMP_SPINCOUNT := 1000
unexport PYTHONPATH VIRTUAL_ENV PYTHONHOME PYTHONDONTWRITEBYTECODE

UV := $(shell command -v uv || echo .uv/bin/uv)
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
PORT ?= 5000
KILLS ?= 50
SEED ?= 0
LONG := contract/test_methods contract/test_networks reference/test_models test_external test_heads test_imported test_mistakes \
  test_properties test_speed test_standalone test_subsets test_fuzz test_hostile test_surroundings  # thousands of cases: `make test` runs them

.PHONY: all setup repro recipe check test chaos ui clean lock audit doctor help

all: setup repro  ## set up, run the pipeline, show the results

setup: .venv/ready  ## create .venv with the locked packages

.uv/bin/uv:
	$$(command -v python3.11 || command -v python3) -m venv .uv
	.uv/bin/pip install -q --disable-pip-version-check uv==0.13.8

.venv/ready: requirements.txt $(if $(findstring .uv,$(UV)),.uv/bin/uv)
	@echo "installing the locked packages into .venv (about 7 GB)"
	$(UV) venv -q --clear --python 3.11 .venv
	$(UV) pip sync -q --python .venv/bin/python --require-hashes requirements.txt
	echo "$(CURDIR)/src" > "$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/pupil.pth"
	@touch .venv/ready

repro: setup  ## run what is out of date, sync the records to MLflow, print the table
	@python -m pupil pipeline
	@echo; echo "to compare the runs: make ui"

recipe: setup  ## NAME=simkd/cifar100/resnet32x4-resnet8x4 into params.yaml; without NAME the list
	@python -m pupil recipe "$(NAME)"

check: setup  ## format, lint, types and the quick tests
	ruff format --check src stages tests benchmarks
	ruff check src stages tests benchmarks
	basedpyright
	python -m pytest -q -m "not slow and not pipeline" $(LONG:%=--ignore=tests/%.py)

test: setup  ## every test
	python -m pytest -q

chaos: setup  ## kill trainings of every kind at KILLS (50) random moments; out/chaos.md says how they end
	python -m tests.chaos --kills $(KILLS) --seed $(SEED) --out out/chaos.md

ui: setup  ## MLflow's pages on this machine only, at PORT (5000)
	@echo "open http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning"
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri "sqlite:///$(CURDIR)/mlflow.db" \
	  --host 127.0.0.1 --port $(PORT) --workers 1

audit: setup $(if $(findstring .uv,$(UV)),.uv/bin/uv)  ## known weaknesses of the locked packages, as far as the index tells
	@python -m pupil.audit requirements.txt $(UV) tool run -q --python 3.11 pip-audit==2.10.1

doctor:  ## look for what does not work on this machine, and say what mends it
	@PYTHONPATH=src $$(command -v python || command -v python3) -m pupil doctor

lock:  ## renew requirements.txt from requirements.in
	$(UV) pip compile --generate-hashes --no-emit-index-url --no-header --python-version 3.11 requirements.in -o requirements.txt

clean:  ## remove outputs and ad-hoc runs; DVC's cache, the tracking store and .venv stay
	rm -rf out runs .work dvc_plots

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*##\s*/\1\t/' | expand -t 10
