# Everything a fresh Debian 12 machine needs, in order. V=1 shows the commands.
Q := $(if $(V),,@)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OBJECTS := pykmesh/kernel/objects
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup build run demo test explore check format proto bench chaos soak test-kernels fuzz clean test-compose istio-tools test-istio

run: setup
	$(Q)$(BIN)/pykmesh demo

demo: run

test: setup
	$(Q)$(BIN)/pykmesh check --brief
	$(Q)$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile $(TEST_ARGS)

explore: setup
	$(Q)$(BIN)/python -m pytest --hypothesis-profile=explore $(TEST_ARGS) tests/unit tests/controlplane tests/telemetry

setup: $(VENV)/.ready build

build: $(OBJECTS)/layout.json services/waypoint_mgr/envoy.json

$(VENV)/.ready: requirements/dev.txt pyproject.toml tools/setup.sh
	$(Q)tools/setup.sh $(PYTHON) $(VENV)

SOURCE = bpf/mesh.bpf.c
$(OBJECTS)/mesh_before_5_13.bpf.o: CPPFLAGS = -DNO_GLOBAL_FUNCTIONS
$(OBJECTS)/cookie.bpf.o: SOURCE = bpf/cookie.bpf.c
$(OBJECTS)/%.bpf.o: $(wildcard bpf/*.h bpf/*.c) | $(VENV)/.ready
	$(Q)echo "building $@"
	$(Q)mkdir -p $(OBJECTS) build
	$(Q)clang -target bpf -mcpu=v3 -O2 -g -Wall -Wextra -Werror $(CPPFLAGS) \
		-I/usr/include/$$(uname -m)-linux-gnu -c $(SOURCE) -o build/$*.bpf.o
	$(Q)bpftool gen object $@ build/$*.bpf.o

$(OBJECTS)/layout.json: $(patsubst %,$(OBJECTS)/%.bpf.o,mesh mesh_before_5_13 cookie) pykmesh/kernel/btf.py
	$(Q)$(BIN)/python -m pykmesh.kernel.btf $(filter %.o,$^) $@

services/waypoint_mgr/envoy.json: services/waypoint_mgr/schema.py $(VENV)/.ready
	$(Q)echo "building $@"
	$(Q)$(BIN)/python -m services.waypoint_mgr.schema $@

proto: $(VENV)/.ready
	$(Q)PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I. --python_out=. --mypy_out=. pykmesh/proto/*.proto

check: setup
	$(Q)$(BIN)/ruff check .
	$(Q)$(BIN)/ruff format --check .
	$(Q)$(BIN)/mypy
	$(Q)$(BIN)/lint-imports --no-cache
	$(Q)$(BIN)/clang-format --dry-run --Werror bpf/*.h bpf/*.c bench/load.c tests/bpf/*.c tests/chaos/*.c
	$(Q)$(BIN)/codespell

format: setup
	$(Q)$(BIN)/ruff check --fix-only .
	$(Q)$(BIN)/ruff format .
	$(Q)$(BIN)/clang-format -i bpf/*.h bpf/*.c bench/load.c tests/bpf/*.c tests/chaos/*.c

# strace kills at system calls.
chaos: setup
	$(Q)command -v strace >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends strace; } >/dev/null
	$(Q)$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

# atheris is large, and nothing else needs it.
fuzz: setup
	$(Q)$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/fuzz.txt
	$(Q)$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

test-kernels: setup
	$(Q)$(BIN)/python -m tests.kernels $(KERNELS_ARGS)

soak: setup
	$(Q)$(BIN)/python -m tests.chaos.soak $(SOAK_ARGS)

bench: setup
	$(Q)$(BIN)/python -m bench $(BENCH_ARGS)

test-compose: setup
	$(Q)tests/compose/run.sh

istio-tools:
	$(Q)tools/istio/build.sh

test-istio: setup
	$(Q)$(BIN)/python -m pytest $(TEST_ARGS) tests/istio

clean:
	$(Q)rm -rf build $(OBJECTS)
