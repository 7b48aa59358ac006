# make demo          a minute of llmux with real engines, no GPU; make demo SERVE=1 stays up for curl
# make fleet         the same with four hosts behind two gateways, one of which is killed
# make test          everything that has to hold before a change goes in
# make help          the other targets

VENV ?= .venv
# How many tests run at once: most of them wait most of the time.
WORKERS ?= 8
BIN := $(VENV)/bin
# The first of these that is Python 3.11 or later; or say make PYTHON=/path/to/python3
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	{ command -v "$$python"; break; }; done)
PLACEMENT := placement routes walk
# What runs with the oldest dependencies: something for each of them, the optional ones included.
OLDEST := core config cli extract middleware observability targets fleet proxy/test_proxy_bytes.py shell/test_watch.py \
	accounts/test_catalogue.py simulator/test_command.py acceptance/test_contract_tracing.py
# Of Python, for what is compiled against it: not every machine which has a compiler has them.
HEADERS = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
COMPILED := llmux/upstream/native.c llmux/accounts/tally.c
SHELL_SCRIPTS := $(wildcard hooks/*.sh examples/*/*.sh) .ci/run

# The tests start llmux hundreds of times: it would be compiled anew each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo fleet test checks suite core oldest lint types shellcheck format walk soak engines fuzz bench timing docs page policies clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS='	' read -r target what; do \
		printf '  make %-11s %s\n' "$$target" "$$what"; done

demo: $(VENV)/.demo ## many clients, three models, one "GPU", real engines on the CPU (SERVE=1: stay up)
	@$(BIN)/python examples/quickstart/demo.py $(if $(SERVE),--serve)

fleet: $(VENV)/.demo ## four hosts with real engines on the CPU, two gateways, a store; one host and the store are killed midway
	@$(BIN)/python examples/fleet/demo.py

test: $(VENV)/.test ## lint, types, all tests; the core with 100 % branch coverage
	@$(MAKE) --no-print-directory --jobs=3 checks suite || { \
		echo "make test: something above has failed: a test, the lint, the types or the coverage" >&2; exit 1; }

# Beside the tests, which leave a CPU idle while they are collected and when the last of them are running.
checks: $(VENV)/.test
	$(MAKE) --no-print-directory --output-sync=target lint types core

suite: $(VENV)/.test
	$(BIN)/python -m pytest tests --ignore=tests/core $(PLACEMENT:%=--ignore=tests/fleet/test_fleet_%.py) --workers=$(WORKERS)

core: $(VENV)/.test ## the tests of the core and of a fleet's placement, with 100 % branch coverage of both
	$(BIN)/python -m pytest tests/core $(PLACEMENT:%=tests/fleet/test_fleet_%.py) --cov-branch \
		--cov-report=term-missing:skip-covered --cov=llmux.core \
		$(foreach module,events fleet_view loading placement routes,--cov=llmux.fleet.$(module))

oldest: ## a part of the tests on Python 3.11, with the oldest dependencies that pyproject.toml allows
	@mkdir -p $(VENV)/oldest
	@python3.11 tests/harness/oldest.py pyproject.toml >$(VENV)/oldest/constraints
	@PIP_CONSTRAINT=$(VENV)/oldest/constraints \
		$(MAKE) --no-print-directory VENV=$(VENV)/oldest PYTHON=python3.11 $(VENV)/oldest/.test
	$(VENV)/oldest/bin/python -m pytest $(OLDEST:%=tests/%) --workers=$(WORKERS)

lint: $(VENV)/.test shellcheck ## ruff, shellcheck, and the warnings of a C compiler where there is one
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@! command -v cc >/dev/null || for file in $(COMPILED); do \
		case $$file in *tally.c) [ -f "$(HEADERS)/Python.h" ] || continue ;; esac; \
		echo "cc: the warnings of $$file"; \
		cc -std=c11 -O2 -fsyntax-only -Wall -Wextra -Wconversion -Werror -isystem "$(HEADERS)" $$file || exit 1; \
	done

shellcheck: $(VENV)/.test
	$(BIN)/shellcheck --check-sourced $(SHELL_SCRIPTS)

types: $(VENV)/.test ## mypy --strict
	$(BIN)/mypy

format: $(VENV)/.test ## let ruff format and mend what it can
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

walk: $(VENV)/.test ## a million events of random walk through the core
	LLMUX_WALK_EVENTS=$(or $(EVENTS),1000000) $(BIN)/python -m pytest -s tests/core/test_walk.py

soak: $(VENV)/.test ## ten minutes of bad days with real processes, and ten of a fleet's (SECONDS=60: shorter; SEED=1)
	$(BIN)/python -m tests.soak.soak $(or $(SECONDS),600) $(SEED)
	$(BIN)/python -m tests.soak.fleet $(or $(SECONDS),600) $(SEED)

engines: $(VENV)/.test ## the shipped hooks with real engines that are installed here (ENGINES="ollama vllm-process")
	PYTHONPATH=. $(BIN)/python -m tests.engine.check $(ENGINES)

fuzz: $(VENV)/.test ## bytes on which two readers differ (READER=head|body|form|answer SECONDS=60); installs atheris
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	PYTHONPATH=. $(BIN)/python tests/fuzz/fuzz.py $(or $(READER),head) --seconds $(or $(SECONDS),60) --corpus .fuzz

bench: $(VENV)/.test ## what llmux adds to a request, next to nginx and others (ROUNDS=5 PEER=name=url; needs gcc)
	$(BIN)/python tests/benchmarks/bench.py --rounds $(or $(ROUNDS),5) --out tests/benchmarks/figures $(if $(PEER),--peer $(PEER))

timing: $(VENV)/.test ## what has to be quick, on a machine which has nothing else to do
	$(BIN)/python -m pytest -s tests/benchmarks/timing_limits.py

docs: $(VENV)/.test ## write the generated parts of the pages in llmux/ anew
	PYTHONPATH=. $(BIN)/python tests/docs/generated.py

page: $(VENV)/.test ## take the pictures of the operators' page anew (needs Chromium)
	PYTHONPATH=. $(BIN)/python -m tests.ui.screenshots

policies: $(VENV)/.test ## compare the policies on all scenarios; write the guide's tables and picture
	PYTHONPATH=. $(BIN)/python -m tests.benchmarks.policies --write

clean: ## remove what was built here, the virtual environment included
	rm -rf $(VENV) .demo .fuzz .coverage .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is brought up to date only when one of these has changed.
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.test: EXTRAS := demo,test
$(VENV)/.demo $(VENV)/.test: pyproject.toml setup.py $(COMPILED) | $(BIN)/pip
	@echo "installing llmux and what it needs into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@$(engine_loads) 2>/dev/null || $(install_libgomp); $(engine_loads)
	@touch $@

# llama.cpp needs GCC's OpenMP library, which every machine with a compiler has and few others.
engine_loads := $(BIN)/python -c 'import xllamacpp'
install_libgomp := if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	echo "installing libgomp1, which llama.cpp needs"; \
	{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install libgomp1; } >/dev/null; \
	else echo "llama.cpp needs a library that is missing; on Debian and Ubuntu: apt install libgomp1" >&2; fi

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "llmux needs Python 3.11 or later: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
		echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; \
		rm -rf $(VENV); exit 1; }
