# Everything a person runs; a target that needs .venv sets it up first. `make help` lists the targets that have a ## line.
PYTHON ?= python3
BIN := .venv/bin
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' plw_mlflow/__init__.py)
IMAGE := plw_mlflow:$(VERSION)
# What the image is built on; name@sha256:... pins it (docs/cloud.md).
BASE := python:3.11-slim
# More for docker build, say --network host or a --secret (Dockerfile).
BUILD :=
# Cells of make study that run at the same time, each on a core of its own.
JOBS := 2
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help run test test-slow study replication replication-smoke replication-data claims ui ui-store test-browser image image-cpu test-image bench mlproject hashes setup

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r target does; do \
		printf '%-16s %s\n' "$$target" "$$does"; done

run: setup ## prepare, train and score a toy model at PLW 0.242
	$(BIN)/python -m entrypoints.main --plw 0.242

test: setup ## formatting, lint, types and tests, as CI runs them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# Types are checked beside the tests, as that takes one core for more than a minute.
	$(BIN)/mypy & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal; passed=$$?; \
	wait $$types && exit $$passed

test-slow: setup output/trl ## tests that take minutes: killed trainings, lost servers, whole sweeps
	OMP_NUM_THREADS=1 PYTHONPATH=output/trl $(BIN)/python -m pytest -m slow --numprocesses 2 --dist worksteal

study: setup ## a toy study: ten PLWs, two data sets, two seeds, analysed
	$(BIN)/python -m entrypoints.sweep --seed 1234,1235 --jobs $(JOBS) --cores-per-cell 1 --output output/study

# The model as a folder, or the hub id for whoever has the network; the records of AlpacaDataCleaned, or a file of them.
MODEL := HuggingFaceTB/SmolLM2-135M-Instruct
RECORDS := AlpacaDataCleaned
SEEDS := 1,2
IN_REPLICATION := mkdir -p output/replication && cd output/replication && \
	MLFLOW_TRACKING_URI=sqlite:///mlflow.db PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1
REPLICATED := --preset toy --model $(MODEL) --method lora --learning-rate 0.001 --max-tokens 256 --save-every 16 \
	--held-out data/alpaca_cleaned_new.jsonl,data/alpaca_short_new.jsonl \
	--tasks arc_easy,arc_challenge,piqa,winogrande,openbookqa,truthfulqa_mc2 $(if $(QUESTIONS),--data-dir $(QUESTIONS))

replication: replication-data ## 24 cells of a small real model, which take hours (docs/replication.md)
	$(IN_REPLICATION) $(HERE)/$(BIN)/python -m entrypoints.sweep $(REPLICATED) \
		--dataset data/alpaca_cleaned.jsonl,data/alpaca_short.jsonl --plw 0,0.01,0.05,0.2463,0.5,1 \
		--seed $(SEEDS) --limit 150 --jobs $(JOBS) --cores-per-cell 1

replication-smoke: replication-data ## one small cell of it
	$(IN_REPLICATION) $(HERE)/$(BIN)/python -m entrypoints.sweep $(REPLICATED) --dataset data/alpaca_short.jsonl --plw 0.05 \
		--seed 1 --limit 2 --max-records 16 --epochs 1

replication-data: setup
	$(IN_REPLICATION) $(HERE)/$(BIN)/python -m benchmarks.replication draw data --model $(MODEL) --dataset $(RECORDS)

claims: setup ## have numbers of README and docs changed? measures some anew, in under ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.claims $(CLAIMS)

ui: ui-store ## MLflow's pages on a store with a small toy study in it, in output/ui
	cd output/ui && $(HERE)/$(BIN)/mlflow ui --workers 1

# Nothing is run again that has finished before. MLflow puts its files where it is started.
HERE := $(CURDIR)
ui-store: setup
	mkdir -p output/ui
	cd output/ui && MLFLOW_TRACKING_URI=sqlite:///mlflow.db PYTHONPATH=$(HERE) OMP_NUM_THREADS=1 \
		$(HERE)/$(BIN)/python -m entrypoints.sweep --plw 0,0.02,0.1,0.5 --seed 1,2 --dataset toy-short --epochs 1 \
		--max-records 300 --jobs 2

# Playwright drives the Chromium that is there, and is for this test alone.
test-browser: ui-store ## look at those pages with Chromium, which has to be installed
	test -d output/playwright || $(PIP) --target output/playwright playwright==1.65.2
	PLW_TEST_STORE=$(HERE)/output/ui PYTHONPATH=output/playwright $(BIN)/python -m pytest tests/browser

# TRL is needed by a benchmark and by the tests of PLWSFTTrainer alone, which leave it out where it is missing.
output/trl: | setup
	mkdir -p output
	$(PIP) --no-deps --target $@ trl==1.16.0 || echo "TRL cannot be had; going on without it"

bench: setup output/trl ## benchmarks that need nothing but this machine, in under 30 minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training --json output/training_15M.json --shapes 15M \
		--lengths alpaca --plw 0.1 --steps 1 --rounds 1
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.training --json output/training_135M.json --shapes 135M \
		--methods lora --lengths alpaca --plw 0.1 --examples 8 --steps 1 --rounds 1
	$(BIN)/python -m benchmarks.loss_head --json output/loss_head.json
	$(BIN)/python -m benchmarks.data --json output/data.json
	$(BIN)/python -m benchmarks.exactness --json output/exactness.json
	$(BIN)/python -m benchmarks.faults --json output/faults.json --shared-kills 3
	@echo "benchmarks.scoring needs ARC's questions: python -m benchmarks.scoring --json FILE --data-dir DIR"

mlproject: setup ## write MLproject again, after a change of options in plw_mlflow/config
	$(BIN)/python -m tests.write_mlproject

hashes: setup ## write the image's list of packages again, after a change of conda.yaml
	$(BIN)/python image/hashes.py "$(CPU_INDEX)"

# Both images have the name that MLproject gives. A base from a registry is named by its digest even where BASE is a tag, so that
# the label says what was built on; one that was made on this machine has an id alone.
image: ## the Docker image, with CUDA (needs a Docker engine)
	docker image inspect $(BASE) >/dev/null 2>&1 || docker pull $(BASE)
	base=$$(docker image inspect --format '{{if .RepoDigests}}{{index .RepoDigests 0}}{{end}}' $(BASE)) && \
	id=$$(docker image inspect --format '{{.Id}}' $(BASE)) && digest=$${base##*@} && \
	DOCKER_BUILDKIT=1 docker build $(BUILD) --build-arg VERSION=$(VERSION) --build-arg IMAGE=$(IMAGE) \
		--build-arg BASE=$${base:-$(BASE)} --build-arg BASE_DIGEST=$${digest:-$$id} \
		--build-arg COMMIT=$$(git describe --always --dirty --abbrev=40 --exclude '*') --tag $(IMAGE) .

image-cpu: ## the Docker image for CPUs alone
	$(MAKE) image BUILD="--build-arg TORCH=cpu --build-arg TORCH_INDEX=$(CPU_INDEX) $(BUILD)"

test-image: setup ## tests of the Docker image, once it is made
	PLW_TEST_IMAGE=$(IMAGE) $(BIN)/python -m pytest tests/image/test_image.py

setup: .venv/installed ## make .venv and install the packages of conda.yaml (minutes and gigabytes)

# Prints a line for each stage, and whatever pip has to say of errors.
PIP := $(BIN)/pip install --quiet --quiet --disable-pip-version-check
.venv/installed: conda.yaml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; say which with make PYTHON=..."; exit 2; }
	@echo "setup 1/3: a virtual environment in .venv"
	@$(PYTHON) -m venv .venv
	@sed -n 's/^ *- \([^ ]*==[^ ]*\)$$/\1/p' conda.yaml > .venv/requirements.txt
	@echo "setup 2/3: torch, the largest package (minutes)"
	@$(PIP) --constraint .venv/requirements.txt torch
	@echo "setup 3/3: $$(wc -l < .venv/requirements.txt) packages in all (minutes)"
	@$(PIP) --requirement .venv/requirements.txt
	@touch $@
