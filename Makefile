# make demo    the whole way on a small model that ships here: no GPU, no hub, no server
# make test    every test, vLLM, llm-compressor and onnxruntime-genai in their own environments included
# make fuzz    every mutated checkpoint, recipe, data file and server answer; make test tries a tenth
# make browser Chromium, for the tests of the HTML report, where there is none
# make check   format, lint and types
# make lock    resolve the tested set of versions again

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/python -m uv

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz browser check lock clean

help:
	@sed -n 's/^# //p' Makefile

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.user: $(BIN)/uv requirements/user.txt pyproject.toml
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements/user.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

$(VENV)/.developer: $(VENV)/.user requirements/developer.txt
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements/developer.txt
	@touch $@

demo: $(VENV)/.user
	$(BIN)/compress run recipes/demo.yaml

test: $(VENV)/.developer browser
	$(BIN)/compress runtime install vllm
	$(BIN)/compress runtime install llmcompressor
	$(BIN)/compress runtime install lmms-eval
	$(BIN)/compress runtime install lm-eval
	$(BIN)/compress runtime install onnxruntime-genai
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # so small models gain nothing by more threads

fuzz: $(VENV)/.developer
	COMPRESS_FUZZ=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -o timeout=7200 -s tests/fuzz

BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
browser:
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq chromium; \
	else echo "install Chromium with your system's package manager (Debian: apt-get install chromium)" >&2; exit 1; fi

check: $(VENV)/.developer
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

lock: $(BIN)/uv
	PATH="$(CURDIR)/$(BIN):$$PATH" requirements/lock.sh

clean:
	rm -rf $(VENV) runs published
