# Every target works as the first command on a machine with Python 3.11+ and make. `make help` lists them.
PYTHON ?= python3
EXTRA ?= cpu
VENV := .venv
BIN := $(VENV)/bin
DEMO := checkpoints/demo
DEMO_STEPS ?= 1800
DEMO_TEXT := checkpoints/demo_text
DEMO_TEXT_STEPS ?= 1800
# Two devices of one core each train faster than one device of two cores: docs/performance.md.
DEMO_DEVICES ?= $(shell test "$$(getconf _NPROCESSORS_ONLN)" -ge 2 && echo 2 || echo 1)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-text sample serve test test-slow test-browser check bench bench-tpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/ready-$(EXTRA): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python 3.11 or newer is needed, {v[0]}.{v[1]} found") if v < (3, 11) else None'
	@echo "creating $(VENV) and installing flowdit[$(EXTRA)] (downloads: a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[$(EXTRA),demo]'
	@touch $@

$(VENV)/ready-test: $(VENV)/ready-$(EXTRA)
	@echo "installing the test extra"
	@$(PIP) -e '.[$(EXTRA),test]'
	@touch $@

$(VENV)/ready-serve: $(VENV)/ready-$(EXTRA)
	@echo "installing the serve extra"
	@$(PIP) -e '.[$(EXTRA),serve]'
	@touch $@

$(VENV)/ready-browser: $(VENV)/ready-test
	@echo "installing the serve and browser extras"
	@$(PIP) -e '.[$(EXTRA),serve,browser]'
	@touch $@

setup: $(VENV)/ready-$(EXTRA) ## create .venv and install (EXTRA=cpu, cuda12, cuda13 or tpu)

demo: setup ## train a small model and draw samples, in minutes on two CPU cores
	@echo "1/3 preparing the embedded data"
	@$(BIN)/python -m flowdit.prepare
	@echo "2/3 training stage 1 (resumes if it was interrupted)"
	@$(BIN)/python train_stage1.py experiment=openmoji_demo train.checkpoint_dir=$(DEMO) train.num_steps=$(DEMO_STEPS) \
		mesh.devices_per_process=$(DEMO_DEVICES) \
		train.is_restore=$(if $(wildcard $(DEMO)/metrics.jsonl),true,false)
	@echo "3/3 sampling and scoring"
	@$(BIN)/python -m flowdit.sample checkpoint=$(DEMO)/$(DEMO_STEPS) out=samples/demo overwrite=true num_images=4 \
		labels=[country-flag,face-smiling,face-concerned,face-neutral-skeptical,heart,cat-face,geometric,country-flag]
	@echo "the image: samples/demo/grid.png"
	@$(BIN)/python -m flowdit.evaluate checkpoint=$(DEMO)/$(DEMO_STEPS) num_images=64 metrics=kid out=$(DEMO)/scores

# The demo's stage 1 runs first if its last checkpoint is missing.
demo-text: setup ## train a text model from the demo's class model and draw samples, in 10 more minutes
	@test -d $(DEMO)/$(DEMO_STEPS) || $(MAKE) --no-print-directory demo
	@echo "1/3 preparing the embedded data"
	@$(BIN)/python -m flowdit.prepare
	@echo "2/3 training stage 2 from the class model (resumes if it was interrupted)"
	@$(BIN)/python train_stage2.py experiment=openmoji_text train.init_from=$(DEMO)/$(DEMO_STEPS) \
		train.checkpoint_dir=$(DEMO_TEXT) train.num_steps=$(DEMO_TEXT_STEPS) \
		mesh.devices_per_process=$(DEMO_DEVICES) \
		train.is_restore=$(if $(wildcard $(DEMO_TEXT)/metrics.jsonl),true,false)
	@echo "3/3 sampling"
	@$(BIN)/python -m flowdit.sample checkpoint=$(DEMO_TEXT)/$(DEMO_TEXT_STEPS) \
		out=samples/demo_text overwrite=true num_images=4
	@echo "the image: samples/demo_text/grid.png"

sample: setup ## draw a grid from the pretrained text model of the repository
	@$(BIN)/python -m flowdit.sample checkpoint=pretrained/emoji_text out=samples/pretrained overwrite=true num_images=2
	@echo "the image: samples/pretrained/grid.png"

serve: $(VENV)/ready-serve ## open the pretrained text model as a page in the browser, http://127.0.0.1:7860
	@$(BIN)/python -m flowdit.serve checkpoint=pretrained/emoji_text

test: $(VENV)/ready-test ## the test suite (a quarter of an hour or more on two cores)
	@$(BIN)/python -m pytest -n 2 --dist loadfile --durations=25
	@echo "left out: the slow tests (make test-slow) and those of the page in a browser (make test-browser)"

test-slow: $(VENV)/ready-test ## the slow tests: full-size models in every format
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# Needs chromium and chromedriver: on Debian, apt-get install chromium chromium-driver.
test-browser: $(VENV)/ready-browser ## the tests of the page in headless Chromium
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ echo "chromium and chromedriver are needed: on Debian, apt-get install chromium chromium-driver"; exit 1; }
	@$(BIN)/python -m pytest -m browser

check: $(VENV)/ready-test ## format, lint, types and code structure
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/python -m pytest tests/test_structure.py

bench: $(VENV)/ready-test ## the benchmarks behind docs/performance.md
	@$(BIN)/python -m benchmarks

# Rows and settings: make bench-tpu ROWS='v5e-fsdp16 model.remat=full'. Rows: benchmarks/tpu.py.
bench-tpu: $(VENV)/ready-test ## cycles of the XL/2 step by the TPU compiler; no TPU is needed (1 to 5 minutes a row)
	@$(BIN)/python -m benchmarks tpu $(ROWS)

clean: ## remove the environment, caches and build leftovers (never data, checkpoints or samples)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
