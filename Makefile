# Two commands: `make train` and `make test`. Both create the environment first.
#   make train CONFIG=configs/iformer_s_cifar10_32.yaml OPTS="-o TRAIN.EPOCHS=3"

PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= configs/quickstart.yaml
# The quick start may be repeated; any other run is replaced only when OPTS has --overwrite.
OPTS   ?= $(if $(filter configs/quickstart.yaml,$(CONFIG)),--overwrite)
TESTS  ?= tests
PY     := $(VENV)/bin/python
# One thread for each of up to four processes: twice the throughput of one process with two threads.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

.PHONY: setup setup-deploy train test test-all compat lint clean

train: setup
	$(PY) tools/train.py -c $(CONFIG) $(OPTS)

test: setup lint
	$(PYTEST) -m "not slow" $(TESTS)

# What `make test` leaves out: twenty kills, large networks, several processes, notebooks, long fuzzing, deployment.
test-all: test setup-deploy
	$(PYTEST) -m slow $(TESTS)

# The main jobs on Paddle 2.6.2, 3.0.0, 3.2.2 and 3.3.1, each in an environment of its own (3 GB; CIFAR10_ROOT).
compat:
	$(PYTHON) tests/compat.py $(PADDLE)

lint: setup
	$(PY) -m ruff check .
	$(VENV)/bin/clang-format --dry-run -Werror kernels/*.cc kernels/*.h

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt requirements-explain.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo "$(PYTHON) is not Python 3.10 to 3.13; name one: make setup PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-explain.txt
	$(PY) -m pip install -q --disable-pip-version-check --no-deps interpretdl==0.8.0
	@touch $@

# PaddleX, ONNX, OpenVINO and the demo: 0.8 GB, see requirements-deploy.txt.
setup-deploy: $(VENV)/.installed-deploy

$(VENV)/.installed-deploy: $(VENV)/.installed requirements-deploy.txt
	@$(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	    { echo "requirements-deploy.txt is for Python 3.11: its tests are skipped" >&2; touch $@; exit 0; }; \
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-deploy.txt && \
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --force-reinstall \
	    paddlex==3.7.2 opencv-python-headless==5.0.0.93
	@touch $@

clean:
	rm -rf $(VENV) output
