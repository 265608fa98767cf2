# `make` says what there is. GNU make 4.3 or newer; everything runs inside the folder's own .venv.

# What makes the environment; left out, the first of python3.11, python3, python3.12, python3.13 that is new enough.
PYTHON ?=
# Of `make install`, by commas; left out, all at first, and later what is there.
EXTRAS ?=
CONFIG ?= examples/smollm2_qlora.yaml
RUN ?= runs/magic-conch
MODEL ?= smollm2-135m-instruct
# Of the GGUF export, as Q4_K_M, and of the ONNX export: int4, int8, fp16, fp32. Left out, by the model's size; the
# demo says for itself.
QUANT ?=
PRECISION ?=
PORT ?= 8000
# Of `make fuzz`.
SECONDS ?= 15
SEED ?= 0

BIN := .venv/bin
# CUDA=1 or 0 stays for the next time.
CUDA ?=
SETUP := PYTHON="$(PYTHON)" ./setup.sh $(if $(CUDA),$(if $(filter 0,$(CUDA)),--no-cuda,--cuda))
REPLACE := $(if $(OVERWRITE),--overwrite)

# A hundred interpreters are started by the tests alone: none should compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install everything demo test test-ui test-all check check-here check-platforms check-win32 check-darwin
.PHONY: conformance image-test ui pull qlora merge export-gguf export-onnx onnx-optimum onnx-alone dist test-csrc
.PHONY: test-gbk test-windows-rules fuzz web-libraries data eval verify serve bench bench-train chat tune doctor clean

help:
	@echo "make demo          everything: environment, model, training, merge, export, server, measurement"
	@echo "make test          install what is needed and run all tests"
	@echo
	@echo "make install       the environment in .venv (CUDA=1: llama.cpp for an NVIDIA card)"
	@echo "make ui            the page in the browser, http://127.0.0.1:7860"
	@echo "make pull          the model MODEL=$(MODEL)"
	@echo "make data          what CONFIG's data holds, and what is trained on"
	@echo "make qlora         train by CONFIG=$(CONFIG)"
	@echo "make eval          held-out loss and scores of RUN, beside its base"
	@echo "make merge         the adapter of RUN=$(RUN) into 16-bit weights"
	@echo "make export-gguf   the merged model of RUN as GGUF, QUANT=Q4_K_M|Q8_0|..., GPTQ=1"
	@echo "make verify        whether the GGUF of RUN is still the merged model"
	@echo "make export-onnx   the same as ONNX, PRECISION=int4|int8|fp16|fp32"
	@echo "make onnx-optimum  check the exporter against another one, optimum, in an environment of its own"
	@echo "make onnx-alone    RUN's ONNX served by nothing but edge[serve,onnx], in an environment of its own"
	@echo "make dist          a release in dist/: wheel, sdist and SHA256SUMS, each installed and served from"
	@echo "make serve         RUN over HTTP, PORT=$(PORT)"
	@echo "make chat          talk to RUN in the terminal"
	@echo "make bench         RUN against the slow baseline"
	@echo "make bench-train   training by CONFIG beside a plain loop"
	@echo "make tune          what was measured for RUN on this machine"
	@echo "make doctor        what this machine has, and what to install for more"
	@echo "make check         lint, types and the quick tests"
	@echo "make check-platforms   types as on Windows and macOS, a part of make check"
	@echo "make test-ui       the page's tests: the whole road by clicks in a Chromium"
	@echo "make test-gbk      the quick tests under the locale zh_CN.GBK, as Windows has it in Chinese"
	@echo "make test-windows-rules   the quick tests with Windows' rules for files"
	@echo "make test-csrc     edge/csrc built for AVX2, AVX512, Windows (MinGW, Wine) and ARM (qemu), and tried"
	@echo "make test-all      all tests, with every family, type and size"
	@echo "make fuzz          odd inputs of every kind, SECONDS=$(SECONDS) a part, SEED=$(SEED)"
	@echo "make web-libraries  the chat page's libraries anew, with npm"
	@echo "make image-test    the images of deploy/, built and used (root, buildah, debootstrap; half an hour)"
	@echo "make conformance   other projects' clients and suites against a running server"
	@echo "make clean         remove caches (models, runs and .venv stay)"
	@echo
	@echo "OVERWRITE=1 lets a stage replace its earlier result."

install:
	@$(SETUP) $(if $(EXTRAS),--extras $(EXTRAS))

# What a stage needs, beside what is there.
extras-%:
	@$(SETUP) --extras $*

demo: extras-serve,train,bench
	$(BIN)/edge demo "$(RUN)" --config "$(CONFIG)" --model "$(MODEL)" $(if $(QUANT),--quant $(QUANT))

# Tests that measure time run alone, all others side by side: three on two cores, since many wait for a process.
ALONE := $(BIN)/python -m pytest -q
BESIDE := $(BIN)/python -m pytest -q --dist worksteal
QUICK := -n 2 -m "not slow and not gpu and not timing and not matrix"

everything:
	@$(SETUP) --extras all,ray

test: everything
	$(ALONE) -m "timing and not matrix"
	$(BESIDE) -n 3 -m "not timing and not matrix"

# What training is compared with, without what it declares to need: .venv has the versions that are pinned here.
.peers/installed:
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) llamafactory==0.9.5 trl==1.16.0
	@touch $@

# LLaMA-Factory's training with the versions that it declares, in front of .venv's torch.
.peers/llamafactory-train/installed: .peers/installed
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) transformers==5.6.0 peft==0.18.1 trl==0.24.0 \
	    datasets==4.0.0 tokenizers==0.22.2 huggingface-hub==1.33.0 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3
	@touch $@

# Everything that is clicked, in a Chromium.
test-ui: everything
	$(ALONE) tests/edge/ui

# What lacks a compiler, an emulator or the processor is left out, with a sentence.
test-csrc: everything
	$(ALONE) tests/csrc

test-all: everything .peers/llamafactory-train/installed
	$(ALONE) -m timing
	$(BESIDE) -n 3 -m "not timing"

check-platforms: everything check-win32 check-darwin

check-win32 check-darwin: check-%:
	$(BIN)/mypy --platform $* --cache-dir .mypy_cache/$*

check-here:
	$(BIN)/mypy

# As on Windows: text files that name no encoding would be read in GBK. The locale lies in the tree, not in the system.
.locale/zh_CN.GBK: everything
	@mkdir -p $(@D)
	@test -e $@ || localedef --inputfile zh_CN --charmap GBK $@ || \
	    { echo "no locale could be made: sudo apt-get install locales" >&2; exit 1; }

test-gbk: .locale/zh_CN.GBK
	LOCPATH=$(CURDIR)/.locale LC_ALL=zh_CN.GBK PYTHONUTF8=0 $(BESIDE) $(QUICK)

# As on Windows: open files are neither replaced nor removed, there are no symbolic links, text has CRLF.
test-windows-rules: everything
	EDGE_WINDOWS_RULES=1 $(BESIDE) $(QUICK)

# One mypy takes one core.
check: everything
	@$(MAKE) --no-print-directory -j2 --output-sync check-here check-win32 check-darwin
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BESIDE) $(QUICK)

# The chat page's libraries, in the versions of their table.
web-libraries: everything
	$(BIN)/python -m tests.support.web_libraries

fuzz: everything
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED)

# Each client's own environment, made anew when its pins change; the server runs in .venv.
.venv-conformance/installed .venv-conformance-openai1/installed: .venv-conformance%/installed: \
    tests/conformance/requirements%.txt
	rm -rf $(@D)
	python3 -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	@touch $@

conformance: everything .venv-conformance/installed .venv-conformance-openai1/installed
	PYTHONPATH=. .venv-conformance/bin/python -m pytest -c tests/conformance/pytest.ini --rootdir . tests/conformance
	PYTHONPATH=. .venv-conformance-openai1/bin/python -m pytest -c tests/conformance/pytest.ini --rootdir . \
	    -p no:asyncio tests/conformance/conform_openai.py

image-test: everything
	$(BIN)/python -m tests.container_images build/images

ui: extras-serve,ui,train
	$(BIN)/edge ui

pull: extras-train
	$(BIN)/edge pull $(MODEL) $(REPLACE)

data: extras-train
	$(BIN)/edge data "$(CONFIG)"

qlora: extras-train
	$(BIN)/edge train "$(CONFIG)" $(REPLACE)

eval: extras-train
	$(BIN)/edge eval "$(RUN)"

merge: extras-train
	$(BIN)/edge merge "$(RUN)" $(REPLACE)

export-gguf: extras-train
	$(BIN)/edge export gguf "$(RUN)" $(if $(QUANT),--quant $(QUANT)) $(if $(GPTQ),--gptq) $(REPLACE)

verify: extras-serve,onnx,train
	$(BIN)/edge verify "$(RUN)/merged" "$(RUN)/gguf"

export-onnx: extras-train,onnx,export-onnx
	$(BIN)/edge export onnx "$(RUN)" $(if $(PRECISION),--precision $(PRECISION)) $(REPLACE)

onnx-optimum: extras-train,onnx,export-onnx
	$(BIN)/edge export onnx "$(RUN)" --check-with optimum

# A release, from what is committed.
dist: extras-serve,onnx,export-onnx
	$(BIN)/python -m tests.support.distribution

onnx-alone: install
	$(BIN)/python -m tests.support.onnx_alone "$(RUN)"

serve: extras-serve,onnx
	$(BIN)/edge serve "$(RUN)" --port $(PORT)

chat: extras-serve,onnx
	$(BIN)/edge chat "$(RUN)"

bench: extras-serve,train,bench
	$(BIN)/edge bench "$(RUN)"

bench-train: everything
	$(BIN)/edge bench train "$(CONFIG)"

tune: extras-serve,onnx
	$(BIN)/edge tune "$(RUN)"

doctor: extras-serve
	$(BIN)/edge doctor

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
