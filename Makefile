# The two commands are `make demo` and `make test`; both install what is missing on a bare Debian 12 (as root).

SHELL := /bin/sh
PREREQUISITES := vdsm/tool/prerequisites.sh
# The agent runs under the system's interpreter: the bindings of libvirt and sanlock must match its libraries.
RUN := PYTHONPATH=build/runtime /usr/bin/python3
DEV := .venv/bin/python
# Each file's tests by one of the processes, the long files first.
SPREAD := --dist loadfile --no-loadscope-reorder
LAB_TESTS = $(DEV) -m pytest -n 3 $(SPREAD) tests/lab
NO_LAB = printf '\n%s\n' '===== THE TESTS OF SEVERAL HOSTS DID NOT RUN: there can be no lab here, see above =====' >&2

.PHONY: help demo up down test lab-test check docs bench torture

help:
	@echo 'make demo      a whole host agent, privately: boots a real guest and makes a template of it; leaves nothing running'
	@echo 'make up        the same daemons, left running in the background; prints how to call them'
	@echo 'make down      ends them'
	@echo 'make test      every test, those of several hosts last (TESTS="-k word" picks some of one host)'
	@echo 'make lab-test  the tests of several hosts alone (TESTS="-k word" picks some)'
	@echo 'make check     style, types and the law of floors; under a minute'
	@echo 'make docs      writes docs/reference and the table of vdsm-client anew from the code; seconds'
	@echo 'make bench     ratios against bare sanlock, qemu-img, sockets and Python'
	@echo 'make torture   the long tests: aborts at random moments; writes docs/proofs'

demo:
	@$(PREREQUISITES) demo
	@$(RUN) -m vdsm.tool.demo

up:
	@$(PREREQUISITES) demo
	@$(RUN) -m vdsm.standalone up

down:
	@$(RUN) -m vdsm.standalone down

# Those of one host, then those of several; with TESTS what it names, of one host unless it names tests/lab.
test:
	@$(PREREQUISITES) test
	@$(DEV) -m pytest -n 3 $(SPREAD) $(TESTS)
	@$(if $(strip $(TESTS)),,if $(PREREQUISITES) lab && $(DEV) -m tests.lab; then $(LAB_TESTS); else $(NO_LAB); fi)

lab-test:
	@if $(PREREQUISITES) lab && $(DEV) -m tests.lab; then $(LAB_TESTS) $(TESTS); else $(NO_LAB); exit 1; fi

check:
	@$(PREREQUISITES) test
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --quiet --check .
	@.venv/bin/mypy
	@$(DEV) -m pytest -q tests/floors_test.py

# Where there is no .venv yet, `make check` makes it.
docs:
	@$(DEV) -m vdsm.tool.reference

bench:
	@$(PREREQUISITES) test
	@$(DEV) -m benchmarks

torture:
	@$(PREREQUISITES) lab
	@$(DEV) -m pytest -m torture --ignore tests/crash tests
	@$(DEV) -m pytest -m torture -n 3 tests/crash
	@$(DEV) -m pytest -m torture tests/lab
