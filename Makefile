# Every target sets up what it needs and does nothing twice. Needs Python 3.11 or later with pip, nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
COMPAT := .venv-compat
SEED := $(or $(SEED),$(shell date +%s))
LOCK_FLAGS := -q --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links
# The oldest transformers that pyproject.toml allows, and the newest hub client it works with.
OLDEST := transformers==5.17.0\nhuggingface-hub<2\n

.PHONY: help install demo campaign campaign-seeds page docs test test-fast test-order test-slow test-gpu bench-gpu \
	test-browser test-compat check format lock clean
.DELETE_ON_ERROR:

help: ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 17

install: .venv/.installed ## Set up .venv from requirements.lock

demo: .venv/.installed ## Sweep the bundled model into runs/demo
	$(BIN)/python jobs/lc_sweep.py --output-path runs/demo

campaign: demo ## Judge the demo's plans against random, first and last layers, into runs/campaign
	$(BIN)/python jobs/campaign.py --config shortv/tiny/campaign.toml

campaign-seeds: demo ## Judge ShortV, its neighbours and the learned systems in one table, into runs/campaign-seeds
	$(BIN)/python jobs/campaign.py --config shortv/tiny/seeds.toml

page: demo ## Write the page of runs/demo, and its picture reports/page.png
	$(BIN)/python jobs/report.py runs/demo
	@$(need_chromium)
	chromium --headless=new $(SANDBOX) --hide-scrollbars --disable-gpu --window-size=1200,1500 --virtual-time-budget=20000 \
		--screenshot=$(CURDIR)/reports/page.png file://$(CURDIR)/runs/demo/report.html 2>/dev/null
	@test -s reports/page.png && echo "written to reports/page.png"

docs: .venv/.installed ## Write reports/TABLES.md from reports/schemas.py
	$(BIN)/python -m reports.schemas

FAST := not slow and not gpu and not browser and not ray

test: test-fast ## Run all tests but the slow, gpu and browser ones
	$(BIN)/python -m pytest -m "ray and not slow and not gpu and not browser"

test-fast: .venv/.installed ## Run the tests that need no Ray
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "$(FAST)"

test-order: .venv/.installed ## Run the fast tests in a random order and with random hashes (SEED=7 repeats one)
	PYTHONHASHSEED=$(SEED) $(BIN)/python -m pytest -n 2 --dist loadfile -m "$(FAST)" --shuffle=$(SEED)

test-slow: .venv/.installed ## Run the slow tests: killed drivers and nodes, submitted jobs, large files
	$(BIN)/python -m pytest -m "slow and not gpu and not browser"

test-gpu: .venv/.installed ## Run the tests that need a CUDA device; they skip without one
	$(BIN)/python -m pytest -m gpu tests/gpu

bench-gpu: .venv/.installed ## Run every GPU benchmark and write one table into runs/bench-gpu
	$(BIN)/python jobs/bench.py gpu

test-browser: .venv/.browser ## Run the tests of the page in headless Chromium
	@$(need_chromium)
	$(BIN)/python -m pytest -m browser tests/browser

test-compat: $(COMPAT)/.installed ## Run the tests of floors 0-2 with the oldest supported transformers
	$(COMPAT)/bin/python -m pytest -m "not slow and not gpu and not ray and not browser" --ignore=tests/workers --ignore=tests/jobs

check: .venv/.installed ## Lint, format check and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/.installed ## Format, and fix what can be fixed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lock: .venv/.installed ## Resolve the three locks anew, keeping pins that still fit
	$(BIN)/uv pip compile $(LOCK_FLAGS) --extra dev pyproject.toml -o requirements.lock
	printf '$(OLDEST)' | $(BIN)/uv pip compile $(LOCK_FLAGS) --no-deps - -o requirements-compat.lock
	printf 'playwright\n' | $(BIN)/uv pip compile $(LOCK_FLAGS) -c requirements.lock - -o requirements-browser.lock

clean: ## Remove environments and caches, keep runs
	rm -rf .venv $(COMPAT) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# Chromium comes from the distribution; the browsers that playwright would download are not needed.
need_chromium = command -v chromium > /dev/null || { test "$$(id -u)" = 0 && apt-get update -q && \
	apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core; } || { \
	echo "Chromium is needed; install it (Debian: apt-get install chromium)" >&2; exit 2; }
# Chromium's sandbox does not start as root.
SANDBOX = $(if $(filter 0,$(shell id -u)),--no-sandbox)

# pip fetches uv and setuptools under their hashes; uv installs the rest in parallel. A few packages come as source:
# they are built with that setuptools, not with whatever is newest (--no-build-isolation). Bytecode is compiled at once:
# Ray starts many processes and gives each a few seconds.
define make_environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "Python 3.11 or later is needed, found: $(PYTHON) ($$($(PYTHON) --version 2>&1))." \
	"Install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
@awk '/^[^ ]/ { keep = /^(uv|setuptools)==/ } keep' requirements.lock > $(1)/bootstrap.lock
$(1)/bin/python -m pip install -q --disable-pip-version-check --require-hashes --no-deps -r $(1)/bootstrap.lock
$(1)/bin/uv pip install -q --python $(1)/bin/python --require-hashes --no-build-isolation --compile-bytecode -r requirements.lock
endef

define install_project
$(1)/bin/uv pip install -q --python $(1)/bin/python --no-deps --no-build-isolation -e .
touch $(1)/.installed
endef

.venv/.installed: requirements.lock pyproject.toml
	$(call make_environment,.venv)
	$(call install_project,.venv)

.venv/.browser: .venv/.installed requirements-browser.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements-browser.lock
	touch $@

$(COMPAT)/.installed: requirements.lock requirements-compat.lock pyproject.toml
	$(call make_environment,$(COMPAT))
	$(COMPAT)/bin/uv pip install -q --python $(COMPAT)/bin/python --require-hashes --no-deps -r requirements-compat.lock
	$(call install_project,$(COMPAT))
