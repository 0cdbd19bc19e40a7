# `make demo` and `make test` do their own set-up; see CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint docs docs-check torture clean
SECONDS ?= 300

$(STAMP): pyproject.toml setup.py $(wildcard endor/kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install.py
	touch $@

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

test: lint docs-check
	ENDOR_REQUIRE_NATIVE=1 ENDOR_REQUIRE_NVRTC=1 $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python scripts/build_docs.py

docs-check: $(STAMP)
	$(BIN)/python scripts/build_docs.py --check

torture: $(STAMP)
	$(BIN)/python scripts/torture --seconds $(SECONDS)

clean:
	rm -rf $(VENV) build *.egg-info .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis endor/kernels/_native*.so
