# `make test` and `make demo` need nothing but Python: the first call builds .venv.
PYTHON ?= python3
PYTEST_ARGS ?= -m "not slow"
BIN := .venv/bin
TINY := $(BIN)/python -m recipes.tiny
READY := .venv/.ready
SUITS := 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))'
VOICE := demo

.PHONY: help setup demo test lint bench tiny tiny-figures protos
help: ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 20

# An upgrade of the system may take its Python from under .venv.
ifneq ($(shell $(BIN)/python -c 'import pip' 2>/dev/null && echo works),works)
$(READY): rebuild
.PHONY: rebuild
endif

setup: $(READY) ## build .venv with the locked versions
$(READY): pyproject.toml constraints.txt
	@{ $(BIN)/python -c $(SUITS) && $(BIN)/python -m pip --version; } >/dev/null 2>&1 || { \
	  $(PYTHON) -c $(SUITS) || \
	    { echo "$(PYTHON) is not Python 3.10 to 3.13; name one: make setup PYTHON=python3.12"; exit 1; }; \
	  $(PYTHON) -m venv --clear .venv || \
	    { echo "no virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }; }
	@echo "installing into .venv (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt --editable '.[dev]'
	@touch $@

demo: setup ## recordings in samples/ become a voice that speaks, with the embedded model
	$(BIN)/python prepare_dataset.py --input samples --output training_data/$(VOICE) --speaker rms \
	  --normalize --split-long
	$(BIN)/python finetune_tts.py --project $(VOICE) --data-dir training_data/$(VOICE) \
	  --model-version tiny --full-pipeline --max-steps 400 --save-every 200 --batch-size 4 \
	  --override optimizer.schedule=wsd --texts docs/lines.txt --eval-samples 12
	$(BIN)/python cli_tts.py "The doctor found a silver key in the garden this morning." \
	  --model-path checkpoints/$(VOICE)-merged -o output/$(VOICE).wav
	@echo "clips      training_data/$(VOICE)"
	@echo "run        results/$(VOICE) (losses: logs/loss.png)"
	@echo "figures    results/$(VOICE)/evaluation/leaderboard.html"
	@echo "voice      checkpoints/$(VOICE)-merged"
	@echo "speech     output/$(VOICE).wav"

test: setup ## the tests; PYTEST_ARGS= runs the slow ones too
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup ## style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup ## how close each piece of work is to the machine's limit
	$(BIN)/python benchmarks/run.py

tiny: setup ## everything that made checkpoints/tiny (hours; needs Debian packages: recipes/tiny)
	$(TINY).texts
	$(TINY).codec
	$(TINY).speech --codec .cache/tiny/codec
	$(TINY).train --closed --minutes 100
	$(TINY).export --codec .cache/tiny/codec
	$(TINY).evaluate

tiny-figures: setup ## word error rates of the embedded model on held-out sentences
	$(TINY).texts
	$(TINY).evaluate

protos: setup ## regenerate the shard format's module
	$(BIN)/python -m grpc_tools.protoc -Ifish_speech/datasets/protos \
	  --python_out=fish_speech/datasets/protos text_data.proto
