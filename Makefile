# libattn: a front for CMake. `make help` lists the targets.
BUILD ?= build
CMAKE_FLAGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

all: ## Build the library and the command (build/attn)
	@scripts/dependencies
	@cmake -S . -B $(BUILD) $(CMAKE_FLAGS) >/dev/null
	@cmake --build $(BUILD) -j $(JOBS)

test: all ## Build and run every test
	@cd $(BUILD) && ctest --output-on-failure -j 1

help: ## This list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 12

.PHONY: all test help
