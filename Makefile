# The environment lives in .venv of this checkout; tools/install.py says what goes into it and skips
# what is done. Variables: PYTHON, DEVICE (auto, cpu, npu), HOST, PORT, MODEL, CONFIG, PYTEST_ARGS,
# SIM_PYTEST_ARGS (for the tests on the simulated NPU), JOBS and MUTANTS_ARGS (for the mutants).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
DEVICE ?= auto
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= models/smollm2
CONFIG ?= configs/serve/smollm2-cpu.yaml
PYTEST_ARGS ?=
SIM_PYTEST_ARGS ?=
WORKERS ?= 2
JOBS ?= 2
MUTANTS_ARGS ?=

BIN := .venv/bin
INSTALL = $(PYTHON) tools/install.py --device $(DEVICE)
CPP_FILES = $(shell find ops -type f \( -name '*.cpp' -o -name '*.h' \))

.DEFAULT_GOAL := help
# What `make checkpoints` makes of SmolLM2: with every tool.
RECIPES ?= w8a8-rtn w8a8-smoothquant-gptq w8a8-static w8a8-kv8 w4a16-gptq-g64 w4a16-awq-g64 \
	w4a16-awq-gptq-g64 w4a16-spinquant-g64 w4a16-quip-g64 w4a8-gptq modelslim-w8a8 \
	modelslim-w8a8-dynamic gptqmodel-w4-g64 auto-round-w4-g64

.PHONY: help install serve test checkpoints test-npu test-ascendc-full test-ascendc-mutants lint format clean python

help: ## show this help
	@echo "ascend-plugin: a vLLM platform plugin for Ascend NPUs with a CPU fallback"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-21s%s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=python3.11 DEVICE=auto|cpu|npu HOST=$(HOST) PORT=$(PORT)"
	@echo "           MODEL=$(MODEL) CONFIG=$(CONFIG) PYTEST_ARGS=... WORKERS=$(WORKERS)"

install: python ## set up .venv with vLLM and the plugin (safe to repeat; resumes)
	@$(INSTALL)

serve: python ## install, fetch the small model, serve it and print a curl line
	@$(INSTALL) --extras model
	@$(BIN)/ascend-plugin model smollm2 models/smollm2
	@$(BIN)/python tools/serve.py $(MODEL) --config $(CONFIG) --host $(HOST) --port $(PORT)

test: lint ## install the test tools, lint, fetch the small model, and run every test
	@$(BIN)/ascend-plugin model smollm2 models/smollm2
	@failed=0; \
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS) || failed=1; \
	rm -f .coverage .coverage.*; \
	$(BIN)/ascend-plugin sim run -- \
	  $(BIN)/coverage run -m pytest -n $(WORKERS) $(SIM_PYTEST_ARGS) tests/sim tests/npu || failed=1; \
	$(BIN)/coverage combine -q && $(BIN)/python tools/npu_call_sites.py || failed=1; \
	exit $$failed

# Not in CI: hours, gigabytes of environments. Safe to repeat; what is made is kept.
checkpoints: python ## quantise SmolLM2 with every tool, test the checkpoints and judge them
	@$(INSTALL) --extras model,plot,test
	@$(BIN)/ascend-plugin model smollm2 models/smollm2
	@test -f models/text/prepared.json || $(PYTHON) tools/prepare_text.py models/text
	@mkdir -p models/quantised
	@for recipe in $(RECIPES); do test -d models/quantised/$$recipe || \
	  $(BIN)/ascend-plugin quantize models/smollm2 --recipe $$recipe \
	  --text models/text/calibrate.txt -o models/quantised/$$recipe || exit 1; done
	@$(BIN)/python -m pytest $(PYTEST_ARGS) tests/quantization/test_smollm2_checkpoints.py
	@$(BIN)/ascend-plugin sim run -- \
	  $(BIN)/python -m pytest $(PYTEST_ARGS) tests/npu/test_smollm2_checkpoints.py
	@$(BIN)/ascend-plugin eval weights models/smollm2 $(addprefix models/quantised/,$(RECIPES)) \
	  --text models/text/evaluate.txt

test-npu: python ## run the device tests on this machine's NPUs
	@$(INSTALL) --extras test
	@$(BIN)/python -m pytest $(PYTEST_ARGS) tests/npu

# CI runs the same tests with fewer schedules. JOBS: mutants at a time.
test-ascendc-full: python ## run the AscendC kernels under 64 schedules each
	@$(INSTALL) --extras test
	@ASCENDC_SCHEDULES=64 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/ascendc

test-ascendc-mutants: python ## break the AscendC kernels, one place at a time, and see what tests find
	@$(INSTALL) --extras test
	@$(BIN)/python tools/ascendc_mutants.py --jobs $(JOBS) $(MUTANTS_ARGS)

lint: python ## check style, types, imports, C++ format and symlinks
	@$(INSTALL) --extras model,plot,test,dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	@$(BIN)/python tools/check_symlinks.py

format: python ## rewrite Python and C++ files in the project's style
	@$(INSTALL) --extras dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP_FILES)

# Not .venv and models/, which take long to get: remove those by hand.
clean: ## remove build outputs and caches (keeps .venv and models)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@rm -f ops/native/lib/*.so ops/ascendc/lib/*.so .venv/.install/plugin.stamp .coverage .coverage.*
	@find . -path ./.venv -prune -o -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +

python:
	@test -n "$(PYTHON)" || { echo "no python3.11 found. Debian 12:" \
	  "sudo apt install python3.11 python3.11-venv python3.11-dev g++ make"; exit 1; }
