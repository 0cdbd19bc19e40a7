# `make demo` and `make test` do their own set-up; see CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
SOURCES := pyproject.toml setup.py scripts/install.py $(wildcard endor/kernels/csrc/*)

.PHONY: demo models wheels test test-lowest versions lint docs docs-check torture clean
SECONDS ?= 300
WORKERS ?= 2

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install.py
	touch $@

# After the other environment: both build the same kernels, in place.
$(LOWEST)/.installed: $(SOURCES) | $(STAMP)
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python scripts/install.py --lowest
	touch $@

versions: $(STAMP)
	$(BIN)/endor info

demo: versions
	$(BIN)/python scripts/demo.py

test: versions lint docs-check
	ENDOR_REQUIRE_NATIVE=1 ENDOR_REQUIRE_NVRTC=1 $(BIN)/python -m pytest -n $(WORKERS)

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/endor info
	ENDOR_REQUIRE_NATIVE=1 $(LOWEST)/bin/python -m pytest -n $(WORKERS) -m "not slow"

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	MYPYPATH=scripts $(BIN)/python -m mypy --explicit-package-bases --follow-imports=silent scripts/*.py tests/support
	MYPYPATH=plugins/vllm $(BIN)/python -m mypy --explicit-package-bases --follow-imports=silent plugins/vllm/endor_vllm plugins/vllm/measure.py
	for folder in make_model models_matrix torture; do MYPYPATH=scripts/$$folder \
		$(BIN)/python -m mypy --explicit-package-bases --follow-imports=silent scripts/$$folder || exit 1; done

docs: $(STAMP)
	$(BIN)/python scripts/build_docs.py
	$(BIN)/python -m mkdocs build --strict --quiet

wheels: $(STAMP)
	$(BIN)/python scripts/build_wheels.py

docs-check: $(STAMP)
	$(BIN)/python scripts/build_docs.py --check

# All models of transformers, about ten minutes on two cores; RECORD=1 renews docs/models.md.
models: $(STAMP)
	$(BIN)/python scripts/models_matrix --workers 2 $(if $(RECORD),--record)

torture: $(STAMP)
	$(BIN)/python scripts/torture --seconds $(SECONDS)

clean:
	rm -rf $(VENV) $(LOWEST) build *.egg-info .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis endor/kernels/_native*.so
