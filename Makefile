# Everything a person runs; each target sets up .venv first if it has to.
PYTHON ?= python3
BIN := .venv/bin
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' plw_mlflow/__init__.py)
IMAGE := plw_mlflow:$(VERSION)
# What the image is built on; name@sha256:... pins it (docs/cloud.md).
BASE := python:3.11-slim
# More for docker build, say --network host or a --secret (Dockerfile).
BUILD :=
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: run test test-slow study image image-cpu test-image bench mlproject hashes setup

run: setup
	$(BIN)/python -m entrypoints.main --plw 0.242

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Trainings that are killed and starved, servers that are lost, whole sweeps: minutes more.
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --numprocesses 2 --dist worksteal

# The published ten PLWs on both toy data sets, with two seeds.
study: setup
	$(BIN)/python -m entrypoints.sweep --seed 1234,1235 --output output/study

bench: setup
	mkdir -p output
	$(BIN)/python -m benchmarks.loss_head --json output/loss_head.json
	$(BIN)/python -m benchmarks.data --json output/data.json
	$(BIN)/python -m benchmarks.exactness --json output/exactness.json
	$(BIN)/python -m benchmarks.faults --json output/faults.json
	@echo "benchmarks.scoring needs ARC's questions: python -m benchmarks.scoring --json FILE --data-dir DIR"

# After a change of options in plw_mlflow/config.
mlproject: setup
	$(BIN)/python -m tests.write_mlproject

# After a change of conda.yaml: the SHA-256 of each file that the image installs.
hashes: setup
	$(BIN)/python image/hashes.py "$(CPU_INDEX)"

# Both make the image that MLproject names. A base from a registry is named by its digest even where BASE is a tag, so that
# the label says what was built on; one that was made on this machine has an id alone.
image:
	docker image inspect $(BASE) >/dev/null 2>&1 || docker pull $(BASE)
	base=$$(docker image inspect --format '{{if .RepoDigests}}{{index .RepoDigests 0}}{{end}}' $(BASE)) && \
	id=$$(docker image inspect --format '{{.Id}}' $(BASE)) && digest=$${base##*@} && \
	DOCKER_BUILDKIT=1 docker build $(BUILD) --build-arg VERSION=$(VERSION) --build-arg IMAGE=$(IMAGE) \
		--build-arg BASE=$${base:-$(BASE)} --build-arg BASE_DIGEST=$${digest:-$$id} \
		--build-arg COMMIT=$$(git describe --always --dirty --abbrev=40 --exclude '*') --tag $(IMAGE) .

image-cpu:
	$(MAKE) image BUILD="--build-arg TORCH=cpu --build-arg TORCH_INDEX=$(CPU_INDEX) $(BUILD)"

# Needs a Docker engine and the image.
test-image: setup
	PLW_TEST_IMAGE=$(IMAGE) $(BIN)/python -m pytest tests/image/test_image.py

setup: .venv/installed

.venv/installed: conda.yaml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; say which with make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv .venv
	sed -n 's/^ *- \([^ ]*==[^ ]*\)$$/\1/p' conda.yaml > .venv/requirements.txt
	$(BIN)/pip install --requirement .venv/requirements.txt
	touch $@
