.DEFAULT_GOAL := help
.PHONY: help install train rlhf test test-slow test-all lint format benchmark clean

PYTHON ?= python3
VENV := .venv
ARGS ?=
export OMP_NUM_THREADS ?= 1

# TORCH=cpu: PyTorch without the libraries of CUDA, which take 4 GB. The first is read by uv, the second by pip
ifeq ($(TORCH),cpu)
export UV_TORCH_BACKEND := cpu
export PIP_EXTRA_INDEX_URL := https://download.pytorch.org/whl/cpu
endif

# $(call environment,REQUIREMENTS): a virtual environment with them, by uv where it is installed, else by venv and pip
define environment
	@if command -v uv >/dev/null; then \
		{ [ -x $(VENV)/bin/python ] || uv venv --quiet --python '>=3.11' $(VENV); } && \
		uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python $(foreach file,$(1),-r $(file)); \
	else \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")' && \
		{ [ -x $(VENV)/bin/pip ] || $(PYTHON) -m venv $(VENV); } && \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(foreach file,$(1),-r $(file)); \
	fi
	@touch $@
endef

$(VENV)/scripts: requirements.txt
	$(call environment,requirements.txt)

$(VENV)/all: requirements.txt benchmark/requirements.txt
	$(call environment,requirements.txt benchmark/requirements.txt)

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/all ## all packages, also those of the tools in benchmark/, into .venv

train: $(VENV)/scripts ## learn to land a spacecraft; more flags in ARGS="--seed 2"; without CUDA: TORCH=cpu
	$(VENV)/bin/python algorithms/ppo.py --env-id LunarLander-v3 $(ARGS)

# $(call stage,SCRIPT,FLAGS): a run in $(RLHF)/SCRIPT. One that was begun goes on; one that is done says so
RLHF ?= runs/rlhf
stage = $(VENV)/bin/python algorithms/$(1).py --run-dir $(RLHF)/$(1) \
	$(if $(wildcard $(RLHF)/$(1)/config.json),--resume,$(2)) $(ARGS)

rlhf: $(VENV)/scripts ## from demonstrations to models that people like better: ten minutes, all in runs/rlhf
	$(call stage,sft)
	$(call stage,reward_model,--model-name $(RLHF)/sft/model)
	$(call stage,dpo,--model-name $(RLHF)/sft/model --beta 0.5 --nll-coef 0.2)
	$(call stage,ppo_rlhf,--model-name $(RLHF)/sft/model --reward $(RLHF)/reward_model/model --beta 0.5)
	$(call stage,grpo,--model-name $(RLHF)/sft/model --reward $(RLHF)/reward_model/model --beta 0.5)
	$(VENV)/bin/python benchmark/replies.py $(addprefix $(RLHF)/,sft dpo ppo_rlhf grpo)

test: $(VENV)/all ## the tests of minutes; some of them in ARGS="-k gae"
	$(VENV)/bin/python -m pytest -m "not slow" $(ARGS)

test-slow: $(VENV)/all ## the others: whole runs of each script, killed and resumed, filmed, learning
	$(VENV)/bin/python -m pytest -m "slow and not again" $(ARGS)

test-all: $(VENV)/all ## all tests
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(VENV)/scripts ## style and mistakes that a machine sees
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/scripts ## mend the style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

benchmark: $(VENV)/all ## the smoke suite; another in ARGS="--suite classic --workers 2"
	$(VENV)/bin/python benchmark/run.py $(or $(ARGS),--suite smoke --workers 2)

clean: ## remove the virtual environment and caches, not the runs
	rm -rf $(VENV) .pytest_cache .ruff_cache
