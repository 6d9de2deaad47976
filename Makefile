# make demo   the shipped checkpoint: what is accelerated, is it right, how fast is it
# make test   the tests, twice: e3nn 0.4 with MACE, and e3nn 0.6 without
# make test-others   packages built on e3nn, and programs around MACE, with ours and without
# make test-versions   every e3nn with the oldest and the newest torch (needs nox)
# make lint   ruff and mypy
# make test-gpu   the tests of the kernels, on an NVIDIA GPU
# make sanitize   every kernel under compute-sanitizer (from the CUDA toolkit)
# make suites  the tests of e3nn 0.4 and 0.6 and of MACE, with stock e3nn and with us: no outcome may differ (an hour or more)
# make clean  remove the environments
#
# The environments are made when they are absent, and brought up to date when pyproject.toml changes.

PYTHON      ?= python3
TORCH       ?= torch==2.13.0
VENV        ?= .venv
VENV_E3NN06 ?= .venv-e3nn06
VENV_OTHERS ?= .venv-others
CHECKPOINT  ?= examples/water_ethanol/water_ethanol.model
STRUCTURES  ?= examples/water_ethanol/structures.xyz
MARKERS     ?= not slow
MARKERS_06  ?= not slow and not once
WORKERS     ?= 2
PYTEST_ARGS ?=
SUITES      ?= .suites
SUITES_ARGS ?=
SANITIZE    ?= compute-sanitizer --kernel-name-exclude kns=native --error-exitcode 9
SANITIZED   ?= tests/gpu/every_kernel.py

# On Linux, PyPI's torch brings gigabytes of CUDA libraries. Without an NVIDIA GPU, take a CPU build:
#   make demo TORCH_INDEX="--index-url https://download.pytorch.org/whl/cpu"
TORCH_INDEX ?=
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

# One thread a worker: more would only fight for the same cores.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(1)/bin/python -m pytest -q -n $(WORKERS) \
	-m "$(2)" $(PYTEST_ARGS)

.PHONY: demo test test-mace test-e3nn06 test-others test-others-e3nn04 test-others-e3nn06 test-versions test-gpu \
	sanitize suites lint environments clean

demo: $(VENV)/installed
	$(VENV)/bin/e3nn-accel verify $(CHECKPOINT) --structures $(STRUCTURES)
	$(VENV)/bin/e3nn-accel bench $(CHECKPOINT)
	$(VENV)/bin/e3nn-accel explain $(CHECKPOINT)

test: test-mace test-e3nn06

test-mace: $(VENV)/installed
	$(call PYTEST,$(VENV),$(MARKERS))

test-e3nn06: $(VENV_E3NN06)/installed
	$(call PYTEST,$(VENV_E3NN06),$(MARKERS_06))

# In two environments, since the packages need different e3nn; each skips what the other has. A file's
# tests share the runs of its program, so a file stays with one worker.
test-others: test-others-e3nn04 test-others-e3nn06

test-others-e3nn04 test-others-e3nn06: test-others-%: $(VENV_OTHERS)-%/installed
	$(call PYTEST,$(VENV_OTHERS)-$*,) --dist loadfile tests/others

test-versions:
	$(PYTHON) -m nox -s versions $(if $(TORCH_INDEX),-- --torch-index $(lastword $(TORCH_INDEX)))

test-gpu: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -m gpu $(PYTEST_ARGS) tests/gpu

# torch's own kernels are left out
sanitize: $(VENV)/installed
	$(SANITIZE) --tool memcheck $(VENV)/bin/python $(SANITIZED)
	$(SANITIZE) --tool racecheck $(VENV)/bin/python $(SANITIZED) --every-thread-arrives

# MACE's tests are in its source distribution, e3nn's only in its repository
suites: $(VENV)/installed $(VENV_E3NN06)/installed $(SUITES)/e3nn $(SUITES)/e3nn06 $(SUITES)/mace
	$(call COMPARE,$(VENV)) $(SUITES)/e3nn/tests
	$(call COMPARE,$(VENV_E3NN06)) $(SUITES)/e3nn06/tests
	$(call COMPARE,$(VENV)) $(SUITES)/mace/tests

COMPARE = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(1)/bin/python tests/other_suites.py $(SUITES_ARGS)
CLONE = git clone -q --depth 1 --branch $$($(1)/bin/python -c "from importlib.metadata import version; \
	print(version('e3nn'))") https://github.com/e3nn/e3nn

$(SUITES)/e3nn: | $(VENV)/installed
	$(call CLONE,$(VENV)) $@

$(SUITES)/e3nn06: | $(VENV_E3NN06)/installed
	$(call CLONE,$(VENV_E3NN06)) $@

$(SUITES)/mace: | $(VENV)/installed
	mkdir -p $@ && $(VENV)/bin/python -m pip download -q --no-deps --no-binary :all: -d $(SUITES) \
	mace-torch==$$($(VENV)/bin/python -c "from importlib.metadata import version; print(version('mace-torch'))")
	tar xzf $(SUITES)/mace_torch-*.tar.gz --strip-components 1 -C $@

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

environments: $(VENV)/installed $(VENV_E3NN06)/installed

# torch first and alone: resolved together with the rest, pip may pick another build of it.
$(VENV)/installed: pyproject.toml
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python $(PIP_INSTALL) "$(TORCH)" $(TORCH_INDEX)
	@$(VENV)/bin/python $(PIP_INSTALL) -e ".[mace,cli,test]"
	@touch $@

$(VENV_E3NN06)/installed: pyproject.toml
	@echo "installing into $(VENV_E3NN06) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV_E3NN06)
	@$(VENV_E3NN06)/bin/python $(PIP_INSTALL) "$(TORCH)" $(TORCH_INDEX)
	@$(VENV_E3NN06)/bin/python $(PIP_INSTALL) -e ".[cli,test]" "e3nn==0.6.*"
	@touch $@

$(VENV_OTHERS)-%/installed: pyproject.toml
	@echo "installing into $(VENV_OTHERS)-$* (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV_OTHERS)-$*
	@$(VENV_OTHERS)-$*/bin/python $(PIP_INSTALL) "$(TORCH)" $(TORCH_INDEX)
	@$(VENV_OTHERS)-$*/bin/python $(PIP_INSTALL) -e ".[test,others-$*]" "$(TORCH)"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_E3NN06) $(VENV_OTHERS)-* $(SUITES)
