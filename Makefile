# Everything runs in .venv, which the first target you call sets up. `make help` lists the targets.

VENV        := .venv
NEWEST      := .venv-newest
TPU         := .venv-tpu
CONSTRAINTS := constraints/jax-0.11.2.txt
JOBS        ?= 2
PYTEST      := -m pytest -n $(JOBS) --dist worksteal

# The leg on the newest jax is smaller: what stands closest to it.
NEWEST_TESTS ?= tests/memory_planner \
	$(addprefix tests/transforms/test_,compat.py control.py gradients.py kv_masks.py models.py quantize.py rewrites.py sites.py)

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## make .venv with the pinned versions

demo: $(VENV)/.ready ## the main job: SmolLM2-135M in fewer bits; writes out/demo/
	$(VENV)/bin/python -m stowax.experiments.demo

test: $(VENV)/.ready ## the fast tests
	$(VENV)/bin/python $(PYTEST) -m "not slow"

test-all: $(VENV)/.ready ## every test: also those of the tables that other tests start from
	$(VENV)/bin/python $(PYTEST)

test-slow: $(VENV)/.ready ## the slow tests of CI
	$(VENV)/bin/python $(PYTEST) -m "slow and not by_hand" || [ $$? -eq 5 ] # 5: none is marked slow

test-newest: $(NEWEST)/.ready ## fast tests on the newest jax that pyproject.toml allows
	$(NEWEST)/bin/python $(PYTEST) -m "not slow" $(NEWEST_TESTS)

test-tpu: $(TPU)/.ready ## what the TPU compiler takes; it needs no TPU
	JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 \
		$(TPU)/bin/python $(PYTEST) -k "tpu_compiler and not every_form" \
		tests/pallas_kernels/test_matmul_tpu.py tests/pallas_kernels/test_decode_attention_tpu.py \
		tests/transforms/test_kv_methods.py \
		tests/memory_planner/test_predict_tpu.py

lint: $(VENV)/.ready-dev ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(VENV)/.ready-dev ## let ruff rewrite what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove environments, caches and outputs
	rm -rf $(VENV) $(NEWEST) $(TPU) out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS) .ci/setup
	.ci/setup $(VENV) $(CONSTRAINTS) test
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	.ci/setup $(VENV) $(CONSTRAINTS) test,dev
	@touch $@

$(NEWEST)/.ready: pyproject.toml constraints/jax-newest.txt .ci/setup
	.ci/setup $(NEWEST) constraints/jax-newest.txt test
	@touch $@

$(TPU)/.ready: pyproject.toml $(CONSTRAINTS) .ci/setup
	.ci/setup $(TPU) $(CONSTRAINTS) test,tpu
	@touch $@

.PHONY: help setup demo test test-all test-slow test-newest test-tpu lint format clean
