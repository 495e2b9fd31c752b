# make demo    install, prepare Fashion-MNIST, train on it with as many ranks as this machine has devices (2 at most)
# make same-bits    one config on 1, 2, 3 and 4 ranks: the digests of its weights
# make gpu    on a machine with a GPU: is everything right there, and how fast; installs nothing, needs torch 2.6
# make test    install what tests need, lint, types, tests (12 minutes at most);  make test-slow: the long proofs
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG := configs/fashion_mnist.yaml
DATA := data/fashion_mnist
RAW := data/raw/FashionMNIST/raw
RUNS := runs/demo
DEBIAN := /usr/share/datasets/fashion-mnist

# What the region decoder is built with. Without it everything works, crops of JPEGs more slowly.
define TOOLS
if ! echo '#include <stdio.h>\n#include <jpeglib.h>' | sed 's/\\n/\n/' | cc -E - >/dev/null 2>&1; then \
  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    (apt-get install -y -qq gcc libc6-dev libjpeg-dev || (apt-get update -qq; apt-get install -y -qq gcc libc6-dev libjpeg-dev)) >/dev/null 2>&1 || true; \
  else echo "region decode of JPEGs will not be built: no C compiler or no jpeglib.h (Debian: gcc libjpeg-dev)"; fi; fi
endef

.PHONY: install test-needs demo same-bits gpu test test-slow lint data
.DELETE_ON_ERROR:

install: $(VENV)/installed
test-needs: $(VENV)/installed-test

$(VENV)/installed: pyproject.toml constraints.txt hatch_build.py dist_trainer/data/jpeg_region.c
	@$(TOOLS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch torchvision
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	@if ! command -v g++ >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    (apt-get install -y -qq g++ || (apt-get update -qq; apt-get install -y -qq g++)) >/dev/null 2>&1 || true; \
	  else echo "tests of engine.compile will be skipped: no C++ compiler (Debian: g++)"; fi; fi
	@if ! PATH="$$PATH:/usr/sbin" command -v slurmd >/dev/null || ! PATH="$$PATH:/usr/sbin" command -v ip >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then export DEBIAN_FRONTEND=noninteractive; \
	    slurm="apt-get install -y -qq --no-install-recommends slurm-wlm slurm-wlm-basic-plugins munge iproute2"; \
	    ($$slurm || (apt-get update -qq; $$slurm)) >/dev/null 2>&1 || true; \
	  else echo "tests of slurm/ and of several hosts will be skipped: no slurmd or ip, or not root (Debian: slurm-wlm slurm-wlm-basic-plugins munge iproute2)"; fi; fi
	@if ! command -v chromium >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then export DEBIAN_FRONTEND=noninteractive; \
	    browser="apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core"; \
	    ($$browser || (apt-get update -qq; $$browser)) >/dev/null 2>&1 || true; \
	  else echo "the test of the report's page will be skipped: no chromium (Debian: chromium)"; fi; fi
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

# The images come from Debian's package where there is one; otherwise torchvision downloads them.
data: $(DATA)/val/index.dtx

$(RAW)/train-images-idx3-ubyte: | $(VENV)/installed
	@mkdir -p $(RAW)
	@if [ ! -d $(DEBIAN) ] && command -v apt-get >/dev/null; then \
	  (cd data/raw && (apt-get download dataset-fashion-mnist || (apt-get update -qq; apt-get download dataset-fashion-mnist)) \
	    && dpkg -x dataset-fashion-mnist_*.deb debian && rm dataset-fashion-mnist_*.deb) >/dev/null 2>&1 || true; fi
	@for folder in $(DEBIAN) data/raw/debian$(DEBIAN); do if [ -d $$folder ]; then \
	  for file in $$folder/*.gz; do gunzip -c $$file > $(RAW)/$$(basename $$file .gz); done; break; fi; done
	@[ -e $@ ] || $(BIN)/python -c "from torchvision.datasets import FashionMNIST; FashionMNIST('data/raw', download=True)"

$(DATA)/val/index.dtx: $(RAW)/train-images-idx3-ubyte
	rm -rf $(DATA)
	$(BIN)/dist-trainer shards pack torchvision/FashionMNIST $(DATA) --root data/raw

demo: install data
ifdef FRESH
	rm -rf $(RUNS)
endif
	@launch=$$(pwd)/launch/local.sh; PATH="$$(pwd)/$(BIN):$$PATH" "$$launch" train $(CONFIG) --run.dir $(RUNS)

same-bits: install data
	@$(BIN)/python benchmarks/same_bits.py --quick

# With the environment of `make install` where there is one, else with the Python that has torch.
gpu:
	@python=$(BIN)/python; [ -x $$python ] || python=$(PYTHON); PYTHONPATH=. $$python benchmarks/gpu.py $(GPU)

# SIGKILL of N processes at random moments; every run has to end with the bits of the undisturbed one.
chaos: test-needs data
	cd tests/support && PYTHONPATH=../.. ../../$(BIN)/python chaos.py $(or $(N),50) $(SEED)

lint: test-needs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pytest with these options. Tests of tests/cluster mostly wait, so they run beside the others; what they say comes last.
define PYTEST
  @log=$$(mktemp); $(BIN)/pytest -q $(1) tests/cluster >$$log 2>&1 & cluster=$$!; trap 'kill $$cluster' INT TERM; \
  $(BIN)/pytest -q $(1) --ignore=tests/cluster; others=$$?; \
  wait $$cluster; status=$$?; cat $$log; rm $$log; exit $$((others | status))
endef

test: lint data
	$(BIN)/pytest -q --no-header --durations=0 -rs -m cuda tests/gpu
	$(call PYTEST,)

test-slow: test-needs data
	$(call PYTEST,-m slow)
