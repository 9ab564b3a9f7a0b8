# The commands of this project. Everything runs inside .venv, which the first command makes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := data/demo
SMALL := tests/conformance
GPUS ?= 8
TORCHRUN := $(BIN)/python -m torch.distributed.run --standalone

# Before .venv is made, since pip would first say so after minutes, and about one package.
define CHECK_VERSION
import sys
found = "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
    sys.exit("error: PYTHON=$(PYTHON): found Python " + found + "; expected 3.11 or newer; give one: make PYTHON=python3.11")
endef
export CHECK_VERSION

.PHONY: quick demo test lint fineweb train clean
.DELETE_ON_ERROR:

# Score a small artifact of this repository on every rung: all of the idea, no training. Seconds after the installation.
quick: $(VENV)/runtime
	EVAL_ONLY=1 MODEL_PATH=$(SMALL)/final_model.int8.ptz DATA_PATH=$(SMALL) PRESET=baseline \
	  TRAIN_SEQ_LEN=512 OUT_DIR=out/quick $(BIN)/python train_gpt.py
	echo && grep "^ladder" "$$(ls -t out/quick/logs/*.txt | head -n 1)"

# Train a small GPT on text that is already on this machine, make the artifact, score it, draw the scores. About 4 minutes on 2 cores
# after the installation. RESUME=auto goes on with a demo that was stopped; RUN_ID=name gives it a name.
demo: $(DEMO)/manifest.json $(VENV)/dev
	PRESET=cpu OUT_DIR=out/demo SCORES_PATH=scores.csv $(TORCHRUN) --nproc_per_node=1 train_gpt.py
	log=$$(ls -t out/demo/logs/*.txt | head -n 1) && \
	  $(BIN)/python records/plot.py out/demo/scores.csv "$$log" --out out/demo && \
	  echo && grep "^ladder\|^final_" "$$log" && \
	  echo && ls -l out/demo/*.ptz out/demo/*.pt out/demo/*.csv out/demo/*.png "$$log"

# Lint, then every test. .ci/run does the same.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The published data, and the full run on GPUS graphics cards.
fineweb: $(VENV)/runtime
	$(BIN)/python data/download_fineweb.py --variant sp1024 --train-shards 80

train: $(VENV)/runtime
	PRESET=baseline $(TORCHRUN) --nproc_per_node=$(GPUS) train_gpt.py

$(DEMO)/docs.jsonl: data/demo_corpus.py | $(VENV)/runtime
	mkdir -p $(DEMO)
	$(BIN)/python data/demo_corpus.py --out $@

$(DEMO)/manifest.json: $(DEMO)/docs.jsonl data/make_shards.py data/check_shards.py | $(VENV)/runtime
	$(BIN)/python data/make_shards.py --input $< --out $(DEMO) --val-docs 64

$(VENV)/runtime: requirements.txt
	test -x $(BIN)/pip || $(PYTHON) -c "$$CHECK_VERSION"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/runtime
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) out logs checkpoints final_model.pt final_model.int8.ptz
