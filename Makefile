# Everything on a fresh machine with Python 3.11-3.13:
#   make demo   set up, stream a video of two garment changes, say where it is
#   make live   set up, and serve a page on this machine: click a garment, see it change
#   make test   set up and run every test
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q

PORT ?= 8000
# Tests run in this many processes; each needs about 3 GB of memory.
JOBS ?= 2

.PHONY: demo live test test-fast test-live lint format clean

demo: $(VENV)/.demo
	JAX_PLATFORMS=cpu $(BIN)/python -m launch.sample --out out/demo.mp4

live: $(VENV)/.live
	JAX_PLATFORMS=cpu $(BIN)/python -m launch.serve --port $(PORT)

test: $(VENV)/.test lint
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-fast: $(VENV)/.test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

# The live server at full size: the time from click to pixel over 50 changes, then an hour of
# faults and hostile input. Nothing else should run.
test-live: $(VENV)/.test
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.serving.latency --switches 50 --out out/latency.json
	JAX_PLATFORMS=cpu CHAMELEON_LIVE_PROOF=full CHAMELEON_LIVE_FIGURES=out/faults.json \
		$(BIN)/python -m pytest tests/serving/faults_test.py tests/serving/hostile_test.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: setup.py | $(BIN)/python
	$(PIP) install -e ".[video]"
	touch $@

$(VENV)/.live: setup.py | $(BIN)/python
	$(PIP) install -e ".[serve]"
	touch $@

# Only the parity tests need torch. First, and by its exact version, so that a CPU build at hand is taken.
# The TPU extra brings the compiler that shows, without a TPU, that the 5B step fits one.
$(VENV)/.test: setup.py | $(BIN)/python
	$(PIP) install "$(TORCH)"
	$(PIP) install -e ".[video,runway,train,curation,ray,serve,eval,tpu,parity,dev]"
	touch $@

clean:
	rm -rf $(VENV) out runs
