# Everything sets itself up in .venv. Python 3.11 is what the constraints were made with; PYTHON=... takes another.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Threads of OpenMP that spin while they wait slow a busy machine down: 100 times, measured with a training run beside.
export OMP_WAIT_POLICY ?= PASSIVE
TORCH := 2.13.0
TRITON := 3.8.0
# A package index with CPU builds of torch, for machines whose default index has CUDA builds only.
TORCH_INDEX ?=
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: demo serve test test-slow test-comfyui probe lint types format bench formats gguf files pages pictures docs site clean

demo: $(VENV)/.ready
	$(BIN)/python demo/run.py --out out/demo

# The editor on the embedded host, on this machine alone: http://127.0.0.1:8199. ARGS="--port 8200 --models DIR".
serve: $(VENV)/.ready
	$(BIN)/quantwire serve $(ARGS)

test: $(VENV)/.ready $(VENV)/.browser
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.ready $(VENV)/.browser $(VENV)/triton/.ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/pyright

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/import_time.py --json out/bench/import_time.json
	$(BIN)/python benchmarks/inspect_time.py --json out/bench/inspect_time.json

# Every format on two models, with docs/formats.md; FORMATS="bnb-nf4 gguf-q8-0" measures some, into out/formats.md.
formats: $(VENV)/.ready
	$(BIN)/python benchmarks/formats.py $(if $(FORMATS),--formats $(FORMATS))

# Every GGUF type and recipe on the demo model, and the sizes of published models: the tables of docs/gguf.md.
gguf: $(VENV)/.ready
	$(BIN)/python benchmarks/gguf_sizes.py
	$(BIN)/python benchmarks/gguf_types.py

# The table of docs/files.md, by making, loading, writing and mending a file of every type. Its column of ComfyUI is
# measured anew where COMFYUI_PATH is set, as for test-comfyui, and taken from tests/files/comfyui_loaded.json otherwise.
files: $(VENV)/.ready
	$(if $(COMFYUI_PATH),QUANTWIRE_WRITE_PAGES=1 $(BIN)/python -m pytest tests/comfyui/test_file_types.py)
	QUANTWIRE_WRITE_PAGES=1 $(BIN)/python -m pytest tests/files/test_file_types.py -m slow

# The example outputs of docs/measuring.md: runs every measuring command on the demo model.
docs: $(VENV)/.ready
	$(BIN)/python benchmarks/measuring_page.py

# QuantConfig's help page from what quantizers/formats declares, docs/compatibility.md from quantizers/compat, and
# locales/ from the nodes and web/: English anew, and empty stubs in the other languages for what is to be translated.
pages: $(VENV)/.ready
	$(BIN)/python -m quantwire.quantizers.help --write
	$(BIN)/python -m quantwire.quantizers.compat.page --write
	$(BIN)/python -m quantwire.nodes.locale_stubs --write

# The nodes as the editor draws them, for their help pages in both languages.
pictures: $(VENV)/.ready $(VENV)/.browser
	$(BIN)/python tests/browser/node_pictures.py
	$(BIN)/python tests/browser/node_pictures.py --locale zh

# The documentation as a site in out/site, its reference pages made from the code; a warning is an error.
site: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "out/site/index.html; to read it: $(BIN)/mkdocs serve"

# torch goes in first and pinned, the CPU build where one is offered; the constraints then hold it, so that no other
# package can bring a CUDA build.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV): some minutes, 3.6 GB of disk"
	@$(PIP) $(INDEX) "torch==$(TORCH)+cpu" 2>/dev/null || { \
	  echo "the package index offers no CPU build of torch $(TORCH); installing its default build"; \
	  $(PIP) $(INDEX) "torch==$(TORCH)"; }
	$(PIP) --constraint constraints.txt --editable ".[standalone,editor,site,backends,sdnq,measure,dev]"
	touch $@

# A Chromium for tests/browser: the system's, installed where this is Debian or Ubuntu and root. Without one these tests
# are skipped with that reason, and fail where QUANTWIRE_REQUIRE_BROWSER is set, as .ci/run does.
$(VENV)/.browser: $(VENV)/.ready
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  { apt-get update -qq || true; } && apt-get install -y -qq --no-install-recommends chromium fonts-wqy-microhei >/dev/null; } || \
	  echo "no Chromium here, and it cannot be installed: the browser tests will be skipped"
	@command -v chromium chromium-browser google-chrome >/dev/null && touch $@ || true

# For the tests of the GPU kernels, which run them in Triton's interpreter and compile them without a GPU. Beside the
# other packages, not among them: some change what they import where they find Triton. 248 MB, Linux only.
$(VENV)/triton/.ready: $(VENV)/.ready
	@$(PIP) --no-deps --upgrade --target $(VENV)/triton "triton==$(TRITON)" && touch $@ || \
	  echo "the package index offers no Triton $(TRITON) for this machine; its tests will be skipped"

# The real host: COMFYUI_PATH is a ComfyUI tree, COMFYUI_PYTHON the Python that runs it.
test-comfyui: $(VENV)/.ready $(VENV)/.browser
	$(BIN)/python -m pytest tests/comfyui
	QUANTWIRE_EDITOR=comfyui $(BIN)/python -m pytest tests/browser

# Every cell of the compatibility table that this machine can run, in the real libraries; fails where the table is wrong
# or a library that it was measured with is missing. `quantwire compat --probe --write` measures anew.
probe: $(VENV)/.ready
	$(BIN)/quantwire compat --probe --check --require-all

clean:
	rm -rf $(VENV) out
