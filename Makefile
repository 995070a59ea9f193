# Needs Python 3.11 or newer and make; every target prepares .venv when it is missing or out of date.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BENCH := .venv/.bench
SITE := .venv/.docs
RELEASE := .venv/.release
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
TYPED := $(wildcard coord pytest_coord.py worker api tests benchmarks demo)

# Files in the order of tests/conftest.py: by number of tests, the longest few would come last.
BESIDE := -n 4 --dist loadfile --no-loadscope-reorder

# Each process of the tests would compile all of it anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv demo serve test test-fast test-matrix coverage planted chaos faults bench-waiting bench-roundtrip bench-scaling bench-backlog docs release-check check format pin clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

venv: $(READY) ## the virtual environment, pinned by constraints.txt

demo: $(READY) ## start the stack, drive 300 orders through it, verify what happened
	@$(BIN)/python -m demo

serve: $(READY) ## start the stack and keep it up
	@$(BIN)/python -m demo --serve

# What failed beside other tests is run again by itself, and fails if it fails then: two cores may be too busy for it.
# Of those that run alone only their files are collected.
test: $(READY) ## the whole suite, on a PostgreSQL and a Valkey of its own
	@$(BIN)/python -m pytest $(BESIDE) -m "not alone and not faults" || \
		{ echo "== Again by itself: what has failed"; \
		$(BIN)/python -m pytest --last-failed --last-failed-no-failures none -m "not alone and not faults"; }
	@$(BIN)/python -m pytest -m "alone and not planted" $$(grep -rl --include="test_*.py" "mark\.alone" tests)

test-fast: $(READY) ## the suite without its slow tests
	@$(BIN)/python -m pytest $(BESIDE) -m "not slow"

test-matrix: $(READY) ## the fast suite on other versions, Pythons and servers; LEGS="oldest newest" picks, PART=core is quicker
	@$(BIN)/python -m tests.matrix $(if $(LEGS),--only $(LEGS) --required) $(if $(PART),--part $(PART))

planted: $(READY) ## plant bugs in copies of the library, and see that the checker finds each; about twelve minutes
	@$(BIN)/python -m pytest tests/test_planted.py

coverage: $(READY) ## the suite, then how much of each package it ran and which lines not; TESTS="tests/test_locks.py" picks
	@rm -rf .coverage
	@$(BIN)/coverage run -m pytest -n 3 --dist loadfile -m "not alone and not faults" $(TESTS); status=$$?; \
		$(BIN)/coverage combine --quiet && $(BIN)/python -m tests.coverage && exit $$status

chaos: $(READY) ## kill, freeze, flush and crash for SECONDS (60), and look up that nothing came of it; SEED repeats a run
	@$(BIN)/python -m tests.chaos $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED)) $(if $(PACE),--pace $(PACE)) $(if $(LOOKS),--looks $(LOOKS))

faults: $(READY) ## every part under every fault, in under fifteen minutes, and the matrix of what held
	@$(BIN)/python -m tests.faults -n 2 --dist loadfile

bench-waiting: $(BENCH) ## measure how waits scale, in five to fifteen minutes, and write docs/benchmarks.md
	@$(BIN)/python -m benchmarks.waiting

bench-roundtrip: $(BENCH) ## measure the round trip beside its peers, in half an hour or more, and write docs/roundtrip.md
	@$(BIN)/python -m benchmarks.roundtrip

bench-scaling: $(BENCH) ## measure more processes, in six minutes, and write docs/scaling.md
	@$(BIN)/python -m benchmarks.scaling

bench-backlog: $(BENCH) ## measure a million jobs for later and 100,000 due at once, in ten minutes, and write docs/backlog.md
	@$(BIN)/python -m benchmarks.backlog

docs: $(SITE) ## build the site into site/, strictly: a link that leads nowhere fails
	@$(BIN)/zensical build --strict --clean

release-check: $(RELEASE) ## build, install the wheel alone, run the README from it, audit licences and vulnerabilities; STRICT=1 to release
	@$(BIN)/python -m tests.release $(if $(STRICT),--strict)

check: $(READY) ## format, lint and strict types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy $(TYPED)

format: $(READY) ## rewrite the code in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

pin: $(BENCH) $(SITE) $(RELEASE) ## write what is installed to constraints.txt
	@$(BIN)/python -m pip freeze --all --exclude-editable > constraints.txt
	@touch $(READY) $(BENCH) $(SITE) $(RELEASE)

clean: ## delete the virtual environments, the caches and the data of coord dev
	@rm -rf .venv .venv-matrix .bench .coord .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage build dist site .cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip comes first: the one that Python 3.11 brings knows no dependency groups.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("coord needs Python 3.11 or newer, and $(PYTHON) is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "Preparing .venv, which takes about a minute the first time"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@$(PIP) install --constraint constraints.txt --upgrade pip hatchling editables
	@$(PIP) install --constraint constraints.txt --no-build-isolation --group dev --editable '.[embedded]'
	@touch $(READY)

# What only the benchmarks need, so that nobody else waits for it.
$(BENCH): $(READY)
	@$(PIP) install --constraint constraints.txt --group bench
	@touch $(BENCH)

# What only the site needs, and what only a release needs.
$(SITE): $(READY)
	@$(PIP) install --constraint constraints.txt --group docs
	@touch $(SITE)

$(RELEASE): $(READY)
	@$(PIP) install --constraint constraints.txt --group release
	@touch $(RELEASE)
