# Each target does all of its own set-up; none needs anything but a Python >= 3.11, make and a package index.
#
#   make demo    screen and generate with the shipped model; .venv gets the lean core (no torch) if it has nothing yet
#   make setup   the development environment: .venv with every extra that a CPU can use
#   make lint    ruff (check and format) and mypy --strict
#   make test    build the wheel, install it into .venv, run the suite against it
#   make bench   measure detection; rows go to bench/results
#   make gpu     on a machine with an NVIDIA GPU: its tests and measurements, under 8 minutes, installing nothing
#   make kernels compile the GPU kernels ahead of time into out/kernels and write their facts to bench/results
#   make evaluate   train what defends, attack it, and write the table to bench/results; hours, and it resumes
#   make clean   remove what was built, and .venv
#
# PYTHON names the interpreter for a new .venv. TORCH_FLAGS goes to the installation of torch: where the package index
# serves a CUDA build by default, TORCH_FLAGS="--index-url ADDRESS", with PyTorch's index of CPU builds, asks for that.

VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet
# for the isolated environment in which pip builds the package; older pips read the first name, newer ones the second
PINNED = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
TORCH_FLAGS =
ROOMS != sed -n 's/^"safelight[a-z/]*" = "\(.*\)"$$/\1/p' pyproject.toml
SOURCES != find $(ROOMS) -type f ! -path '*/__pycache__*' ! -path 'models/shapes/model*' ! -path 'bench/results*'

.PHONY: help demo setup lint test bench gpu kernels evaluate clean wheel

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/lean.stamp
	PYTHONPATH= $(BIN)/python -P tools/demo.py

setup: $(VENV)/dev.stamp
	@echo "$(VENV) is ready"

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/devlinks.py
	$(BIN)/mypy
	MYPYPATH=.dev $(BIN)/mypy --no-namespace-packages $$(find tools examples -name '*.py')

# pytest, never `python -m pytest`: that puts the repository root on sys.path, where kernels/ shadows another package
test: wheel
	PYTHONPATH= $(BIN)/pytest

bench: wheel
	PYTHONPATH= $(BIN)/safelight bench detect

# needs torch with CUDA, triton and pytest; nothing is installed, not even this package
GPU_PYTHON = python3
gpu:
	$(GPU_PYTHON) -P tools/gpu.py

kernels: $(VENV)/dev.stamp
	$(BIN)/python tools/devlinks.py
	rm -rf out/kernels
	PYTHONPATH=.dev $(BIN)/python -P -m safelight kernels build --out out/kernels
	PYTHONPATH=.dev $(BIN)/python -P -m safelight.bench.kernel_facts --folder out/kernels

EVALUATED = sdd safegen dark_miner safe_cfg latent_checker
ERASED = sdd safegen safegen_paper dark_miner safe_cfg alignment
ERASED_TWO = sdd_two safe_cfg_two sdd_two_poster sdd_two_released
# from the checkout: weights of model and judge are in no wheel
evaluate: $(VENV)/dev.stamp
	$(BIN)/python tools/devlinks.py
	PYTHONPATH=.dev $(BIN)/python -P -m safelight.bench.safety.train --out out/evaluate/models --jobs 2
	PYTHONPATH=.dev $(BIN)/python -P -m safelight evaluate --models base=models/shapes/model \
	  $(foreach name,$(EVALUATED),--models $(name)=out/evaluate/models/$(name)) \
	  --count 240 --tasks 20 --stack dark_miner --jobs 2 --out out/evaluate/table --publish bench/results
	rm -f bench/results/erasure.csv
	PYTHONPATH=.dev $(BIN)/python -P -m safelight.bench.safety.erasure --count 300 --redirected safe_cfg \
	  --models $(foreach name,$(ERASED),$(name)=out/evaluate/models/$(name)) --out bench/results/erasure.csv
	PYTHONPATH=.dev $(BIN)/python -P -m safelight.bench.safety.erasure --count 300 --redirected safe_cfg_two \
	  --models $(foreach name,$(ERASED_TWO),$(name)=out/evaluate/models/$(name)) \
	  --kinds star heart --out bench/results/erasure.csv
	PYTHONPATH=.dev $(BIN)/python -P -m safelight.bench.safety.signal --out bench/results/signal.csv

wheel: $(VENV)/dev.stamp
	rm -rf dist
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	$(PIP) install --no-deps --force-reinstall dist/safelight-*.whl
	@touch $(VENV)/lean.stamp

clean:
	rm -rf $(VENV) .dev dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# the package and what it needs; again whenever a source file, a pin or a requirement changed
$(VENV)/lean.stamp: pyproject.toml constraints.txt $(SOURCES)
	@PYTHON="$(PYTHON)" tools/venv.sh $(VENV)
	@echo "installing the lean core into $(VENV)"
	@$(PINNED) $(PIP) install -c constraints.txt .
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" tools/venv.sh $(VENV)
	@echo "installing the development environment into $(VENV); this takes minutes, once"
	@$(PIP) install $(TORCH_FLAGS) torch==2.13.0
	@$(PINNED) $(PIP) install -c constraints.txt '.[dev]'
	@touch $(VENV)/lean.stamp $@
