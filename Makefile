# The two commands of a newcomer are `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
BIN = .venv/bin
# Two threads that wait for each other by spinning are up to five times slower on a machine that is shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow bench-gpu miniature lint

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint,demo]'
	touch $@

demo: .venv/installed
	$(BIN)/sami-cache demo --out demo

test: .venv/installed
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

bench-gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py

# The paper's tables on CIFAR-10: make miniature CIFAR=DIR PHOTOS=DIR. Repeated, it goes on; then it writes the report.
WORK ?= miniature
BUDGET ?= 3h
SEEDS ?= 3
miniature: .venv/installed
	$(if $(and $(CIFAR),$(PHOTOS)),,$(error make miniature CIFAR=DIR PHOTOS=DIR [WORK=DIR BUDGET=3h SEEDS=3 ARMS="sami mae"]))
	-$(BIN)/python benchmarks/miniature.py --cifar '$(CIFAR)' --photos '$(PHOTOS)' --work '$(WORK)' --budget $(BUDGET) \
		--seeds $(SEEDS) $(if $(ARMS),--arms $(ARMS))
	$(BIN)/python benchmarks/miniature.py --cifar '$(CIFAR)' --photos '$(PHOTOS)' --work '$(WORK)' --report

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

