# `make help` lists the targets. Every target makes .venv first, once.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# An interpreter for setup in place of python3
PYTHON ?=
BIN := .venv/bin
STAMP := .venv/.installed

DEMO_PRETRAIN := configs/demo_pretrain.yaml
DEMO_FINETUNE := configs/demo_finetune.yaml
DEMO_SEGMENT := configs/demo_segment.yaml
DEMO_DETECT := configs/demo_detect.yaml
# Dotted overrides for pretrain, finetune, segment and detect: ARGS="train.micro_batch=16 name=second"
ARGS ?=
# An archive or folder of your own in place of the demo's images, for both stages
SOURCE ?=
# Which demo source to use where npm or apt is missing: icons or clipart
ONLY ?=
FORMAT ?= $(shell $(BIN)/python -c 'import ffcv' 2>/dev/null && echo both || echo webdataset)
PORT ?= 5000
# REVIEW=page: `make review` writes its page, and starts no MLflow
REVIEW ?=
export HOSTFILE RANKS
# The cheap part of `make doctor`, on this host; with HOSTFILE= launch/deepspeed.sh does that
LOOK = [ -n "$$HOSTFILE" ] || [ "$${DOCTOR:-1}" = 0 ] || $(BIN)/python -m pipeline doctor --fast --quiet --launching
# What launch/places says: the demo is sized for one or two ranks, however many GPUs there are
DEMO_RANKS = places=$$($(BIN)/python -m launch.places demo) || exit; eval "$$places"

# What a variable cannot be is said before anything is made
ifneq ($(filter-out icons clipart,$(ONLY)),)
$(error ONLY=$(ONLY): it can be icons or clipart)
endif
ifneq ($(filter-out page,$(REVIEW)),)
$(error REVIEW=$(REVIEW): it can be page, or left out)
endif
ifneq ($(and $(filter command,$(origin VENV)),$(filter-out .venv,$(VENV))),)
$(error VENV=$(VENV) is for the scripts in launch/: make has .venv)
endif
ifneq ($(filter pretrain adapt finetune segment detect,$(MAKECMDGOALS)),)
ifneq ($(origin CONFIG),undefined)
ifeq ($(strip $(CONFIG)),)
$(error CONFIG is empty: name a file of configs/, or leave it out for the demo)
endif
ifneq ($(SOURCE),)
$(error SOURCE= is for the demo's configuration: with CONFIG=, `make data SOURCE=...` first, then ARGS="data.path=data/own")
endif
endif
endif

.PHONY: help setup places plan data scenes doctor pretrain adapt finetune segment detect evaluate stop review test chaos bench lint picture clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo '  variables: CONFIG= HOSTFILE= RANKS= ARGS="key=value ..." SOURCE= ONLY=icons|clipart RUN= PORT= REVIEW=page'

setup: $(STAMP) ## .venv with the pinned packages, and FFCV where its libraries are (others call it)

$(STAMP): pyproject.toml constraints.txt launch/setup.sh pipeline/data/_jpeg.c pipeline/data/_huffman.h
	@$(if $(PYTHON),PYTHON="$(PYTHON)") launch/setup.sh
	@touch $@

data: $(STAMP) ## the demo's images as shards and .beton (or SOURCE=your archive or folder)
ifeq ($(SOURCE),)
	@[ -e data/demo-22k/dataset.json ] && [ -e data/demo-1k/dataset.json ] || { \
	  $(BIN)/python -m data_prep demo --output data/raw $(if $(ONLY),--only $(ONLY)) && \
	  for set in demo-22k demo-1k; do \
	    $(BIN)/python -m data_prep shard --source data/raw/$$set.tar --val-source data/raw/$$set-val.tar \
	      --output data/$$set --format $(FORMAT) --samples-per-shard 500 || exit; \
	  done; }
else
	@$(BIN)/python -m data_prep shard --source "$(SOURCE)" --val-per-class 10 --output data/own --format $(FORMAT)
OWN_PRETRAIN := data.path=data/own name=own-pretrain
OWN_FINETUNE := data.path=data/own name=own-finetune init.checkpoint=runs/own-pretrain
endif

scenes: $(STAMP) ## the demo's scenes, with masks and with boxes: data/demo-scenes-semantic, data/demo-scenes-instance
	@[ -e data/demo-scenes-semantic/dataset.json ] && [ -e data/demo-scenes-instance/dataset.json ] || { \
	  $(BIN)/python -m data_prep demo --scenes --output data/raw && \
	  $(BIN)/python -m data_prep shard-dense --ade20k data/raw/demo-scenes/ADEChallengeData2016.zip \
	    --output data/demo-scenes-semantic --samples-per-shard 250 && \
	  $(BIN)/python -m data_prep shard-dense --coco data/raw/demo-scenes/coco \
	    --output data/demo-scenes-instance --samples-per-shard 250; }

ifeq ($(origin CONFIG),undefined)
plan: $(STAMP) ## what SOURCE=your archive or folder would take as shards; CONFIG=... [ARGS="--gpu h200 --gpus 64"]: a run
	@$(BIN)/python -m data_prep plan --source "$(SOURCE)" --val-per-class 10 --output data/own
else
plan: $(STAMP)
	@$(BIN)/python -m pipeline plan "$(CONFIG)" $(ARGS)
endif

doctor: $(STAMP) ## what would go wrong on the hosts of a run: CONFIG=... [HOSTFILE=...] [ARGS="--fast key=value"]
	@$(BIN)/python -m pipeline doctor "$(or $(CONFIG),$(DEMO_PRETRAIN))" $(if $(HOSTFILE),--hostfile "$(HOSTFILE)") $(ARGS)

places: $(STAMP)
	@$(DEMO_RANKS)

ifeq ($(origin CONFIG),undefined)
pretrain: places data ## the demo: images, shards, pretraining. CONFIG=... [HOSTFILE=...] [ARGS="key=value"]: a real run
	@$(DEMO_RANKS); $(LOOK) $(DEMO_PRETRAIN) $(OWN_PRETRAIN) $(ARGS) || exit; \
	launch/deepspeed.sh pretrain $(DEMO_PRETRAIN) $(OWN_PRETRAIN) $(ARGS)

finetune: places data ## the second stage, from the pretrained checkpoint. CONFIG=... as above
	@$(DEMO_RANKS); $(LOOK) $(DEMO_FINETUNE) $(OWN_FINETUNE) $(ARGS) || exit; \
	launch/deepspeed.sh finetune $(DEMO_FINETUNE) $(OWN_FINETUNE) $(ARGS)
else
pretrain: $(STAMP)
	@$(LOOK) "$(CONFIG)" $(ARGS)
	@launch/deepspeed.sh pretrain "$(CONFIG)" $(ARGS)

finetune: $(STAMP)
	@$(LOOK) "$(CONFIG)" $(ARGS)
	@launch/deepspeed.sh finetune "$(CONFIG)" $(ARGS)
endif

ifeq ($(origin CONFIG),undefined)
segment: places scenes ## the demo: masks of its scenes, from the pretrained backbone where there is one. CONFIG=... as above
	@$(DEMO_RANKS); [ -e runs/demo-pretrain/summary.json ] || fresh=init.checkpoint=null; \
	launch/deepspeed.sh segment $(DEMO_SEGMENT) $$fresh $(ARGS) && \
	$(BIN)/python -m pipeline evaluate-segment runs/demo-segment
else
segment: $(STAMP)
	@$(LOOK) "$(CONFIG)" $(ARGS)
	@launch/deepspeed.sh segment "$(CONFIG)" $(ARGS)
endif

ifeq ($(origin CONFIG),undefined)
detect: places scenes ## the demo: boxes and masks of its scenes' objects, otherwise as segment. CONFIG=... as above
	@$(DEMO_RANKS); [ -e runs/demo-pretrain/summary.json ] || fresh=init.checkpoint=null; \
	launch/deepspeed.sh detect $(DEMO_DETECT) $$fresh $(ARGS) && \
	$(BIN)/python -m pipeline evaluate-detect runs/demo-detect
else
detect: $(STAMP)
	@$(LOOK) "$(CONFIG)" $(ARGS)
	@launch/deepspeed.sh detect "$(CONFIG)" $(ARGS)
endif

adapt: $(STAMP) ## a pretrained net to a larger resolution: CONFIG=configs/adapt_hornet_l_gf_in22k_384.yaml
	@$(LOOK) "$(or $(CONFIG),$(error adapt takes CONFIG=configs/adapt_hornet_l_gf_in22k_384.yaml, or another of yours))" $(ARGS)
	@launch/deepspeed.sh adapt "$(CONFIG)" $(ARGS)

RUN ?= runs/demo-finetune
evaluate: $(STAMP) ## accuracy of RUN=runs/NAME (its newest checkpoint) on its validation images
	@$(BIN)/python -m pipeline evaluate "$(RUN)"

stop: $(STAMP) ## RUN=runs/NAME, on whatever hosts it runs: a checkpoint, then exit code 75
	@$(BIN)/python -m pipeline stop $(if $(filter file,$(origin RUN)),runs/demo-pretrain,"$(RUN)")

review: $(STAMP) ## runs/ compared, or RUN=runs/NAME: a page, and MLflow at PORT=5000 beside it (REVIEW=page: the page alone)
	@$(BIN)/python -m pipeline review $(if $(filter file,$(origin RUN)),,"$(RUN)") $(if $(filter page,$(REVIEW)),,--mlflow) --port "$(PORT)"

test: $(STAMP) ## the test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

chaos: $(STAMP) ## 25 short pretrainings killed at random (half an hour), and long walks between world sizes
	@$(BIN)/python -m tests.chaos $(ARGS)
	@RESUME_STEPS=54 $(BIN)/python -m pytest -q tests/pipeline/training/test_resume.py

bench: $(STAMP) ## the benchmarks in tests/bench (ratios against named baselines)
	@for file in tests/bench/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit; done

lint: $(STAMP) ## ruff (lint and format), mypy and shellcheck
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch tests/gpu/*.sh .ci/run .githooks/*
	@$(BIN)/shellcheck --severity warning findings/*.sh

picture: $(STAMP) ## .readme/house.svg, drawn anew from the imports
	@$(BIN)/python -m tests.support.picture

clean: ## removes the demo's data and runs, and caches; data/ and runs/ of yours and .venv stay
	rm -rf data/raw data/demo-22k data/demo-1k data/demo-scenes-semantic data/demo-scenes-instance
	rm -rf runs/demo-pretrain runs/demo-finetune runs/demo-segment runs/demo-detect
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
