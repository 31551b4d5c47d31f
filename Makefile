# The whole project is four commands: demo, test, check, bench (and test-all, what CI runs). Each makes .venv first if it is not there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The CUDA set where the driver lists a GPU, else the CPU set
SET ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
OTHER := $(if $(filter gpu,$(SET)),cpu,gpu)
BIN := .venv/bin
# Processes of `make test`; a file's tests share what they set up and stay in one
WORKERS ?= 2
READY := .venv/ready-$(SET)
# One thread for each process: two ranks on two cores do not fight
export OMP_NUM_THREADS ?= 1
# Some images set it: then each of the tests' processes would compile every module of ours anew
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all check bench docs help

help:
	@echo "make demo       environment, synthetic data, a sharded two-process training run, its report"
	@echo "make test       environment and the default tests: 4 to 5 minutes on two cores"
	@echo "make test-all   the long tests too: every README command, all reshardings, Slurm, hosts that come and go"
	@echo "make check      ruff, pyright, import-linter"
	@echo "make docs       the documentation as a site in .site"
	@echo "make bench      every benchmark, short"

demo: $(READY)
	$(BIN)/mbcnet data synth --out prepared/demo --rows 400000
	$(BIN)/torchx run -s local_cwd launch/components.py:train --config mbcnet_rec/configs/demo.toml -j 1x2 -- --overwrite

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not long"

test-all: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .docs/ready
	.docs/bin/mkdocs build --quiet

.docs/ready: requirements/docs.txt
	@test -x .docs/bin/python || $(PYTHON) -m venv .docs
	@.docs/bin/python -m pip install -q --progress-bar off -r requirements/docs.txt
	@touch $@

bench: $(READY)
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script --quick || exit 1; done

$(READY): requirements/$(SET).txt pyproject.toml
	@echo "installing the $(SET) set into .venv: a minute or two, more where torch must be fetched"
# one set never on top of the other: both have a package fbgemm_gpu, and pip would mix its files
	@test -x $(BIN)/python -a ! -e .venv/ready-$(OTHER) || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -q --progress-bar off -r requirements/$(SET).txt
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
