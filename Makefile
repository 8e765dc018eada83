# Targets for developers and visitors: `make` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
WORKERS ?= 2
QUICK := tests/unit tests/programs/test_readme.py::test_readme_is_short --ignore tests/unit/test_features.py -k "not ranks"

.DEFAULT_GOAL := help
.PHONY: help setup demo quick test test-real lint bench gpu-check reproduce clean

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## build .venv with everything that the tests need (does nothing when it is up to date)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.12 setup"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python .ci/install.py --quiet -c constraints.txt -e '.[dev,sweep,optuna,ltad,export]'
	@touch $@

demo: setup ## train two methods on drawn images; a table, and a page and figures under outputs/demo (3 minutes on 2 CPU cores, no network)
	rm -rf outputs/demo
	$(BIN)/python -m anomalib_lite.train +experiments=demo hardware=cpu seed=0 hydra.run.dir=outputs/demo/norm_occ
	$(BIN)/python -m anomalib_lite.train +experiments=demo_ssae hardware=cpu seed=0 hydra.run.dir=outputs/demo/ssae
	$(BIN)/python -m anomalib_lite.compare outputs/demo --html outputs/demo/page.html

quick: setup ## the fast tests (less than 90 seconds)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(QUICK)

test: setup ## all tests, on generated data, in WORKERS=2 processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-real: setup ## tests on real images (ANOMALIB_LITE_DATA=DIR names their folder), and the slow tests
	$(BIN)/python -m pytest -m "real or slow" -rs -s

lint: setup ## ruff (format and lint) and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup ## timings, each beside a well-known implementation, in one run
	$(BIN)/python -m pytest -m bench -s

gpu-check: setup ## is a GPU's result the CPU's, and how fast is it? as much as 8 minutes allow; without a card it says so (ARGS="--output FILE.md")
	$(BIN)/python -m tests.benchmarks.gpu_check $(ARGS)

reproduce: setup ## run the settings of experiments/published.yaml on the data in DATA=DIR and compare; it can be stopped and started again (ARGS=--dry-run: the time)
	$(BIN)/python experiments/reproduce.py "$(DATA)" $(ARGS)

clean: ## remove what runs and builds leave behind (not .venv)
	rm -rf outputs wandb build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
