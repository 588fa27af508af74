# Everything runs in .venv at the root, which `make setup` (a part of every target) makes from nothing.
PYTHON ?= python3
BIN := .venv/bin
# Short: tests run beside each other, and a thread that spins for long takes the core from the other.
export GOMP_SPINCOUNT ?= 10000
# Tests that wait for one process fill the second core with those of another file.
TOGETHER := -n 2 --dist loadfile

.PHONY: help setup demo test check unit distributed gpu e2e chaos soak slurm network format clean bench-prediction bench-checkpoint bench-train bench-tp bench-gpu bench-planner bench-search bench-time-to-loss bench-network calibrate loop

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

setup: ## make .venv (quick the second time)
	@$(PYTHON) tools/setup.py

demo: setup ## the whole chain on this machine, on real text (about 5 minutes; TEXT=DIR for your own text)
	@$(BIN)/bloomery demo $(if $(TEXT),--text "$(TEXT)")

test: check unit distributed e2e ## everything that must pass: checks and all tests

check: setup ## lint, format, types, import directions, rules of the house
	$(BIN)/ruff check src tests tools bench
	$(BIN)/ruff format --check src tests tools bench
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/house.py

unit: setup ## tests of single rooms
	$(BIN)/pytest tests/unit -q $(TOGETHER)

distributed: setup ## exactness of every parallel layout against one process, in float64
	$(BIN)/pytest tests/distributed -q $(TOGETHER)

gpu: setup ## what one GPU computes beside what a CPU does (skipped where there is none)
	$(BIN)/pytest tests/gpu tests/unit/parallel/test_float8.py -q

e2e: setup ## whole commands as a user runs them
	$(BIN)/pytest tests/e2e -q

chaos: setup ## the fault matrix F1 to F19 in about 30 minutes, seeded; a table of goals and figures (SEED=0 JSON=FILE)
	TMPDIR="$(firstword $(wildcard /dev/shm) /tmp)" SEED="$(SEED)" CHAOS_JSON="$(JSON)" OMP_NUM_THREADS=1 $(BIN)/pytest tests/chaos -q

soak: setup ## F20: a run left alone with random faults, 100 an hour (MINUTES=120 SEED=0 PER_HOUR=100 JSON=FILE)
	TMPDIR="$(firstword $(wildcard /dev/shm) /tmp)" SEED="$(SEED)" $(BIN)/python tests/chaos/soak.py --minutes $(or $(MINUTES),120) --per-hour $(or $(PER_HOUR),100) \
	  $(if $(JSON),--json "$(JSON)")

slurm: setup ## a real Slurm of two nodes on this machine: limits, requeues, lost nodes, end with the same bits (root; slurm-wlm, munge)
	$(BIN)/pytest tests/slurm -q

network: setup ## probe and doctor on network namespaces as hosts, with shaped links (root, iproute2)
	$(BIN)/pytest tests/network -q

format: setup ## put the code in order
	$(BIN)/ruff check --fix src tests tools bench
	$(BIN)/ruff format src tests tools bench

loop: setup ## probe, predict, run, calibrate on half, predict the other half (20 minutes; QUICK=1: four runs; OUT=DIR)
	$(BIN)/python bench/loop.py --out $(or $(OUT),runs/loop) --page $(or $(OUT),runs/loop)/loop.html $(if $(QUICK),--quick)

bench-prediction: setup ## predicted beside measured step time on this machine (dp1, dp2, tp2, pp2)
	$(BIN)/python bench/step_time_prediction.py

bench-checkpoint: setup ## stall and restore of a checkpoint beside PyTorch's asynchronous DCP, same state, in turns (BENCH="--rounds 8")
	$(BIN)/python bench/checkpoint_stall.py $(BENCH)

# PEERS: a folder with the environments hf and litgpt, made there when they are missing (PEERS=build/peers makes them here).
bench-train: setup ## tokens/s and memory beside Hugging Face Trainer, litgpt and a plain loop (PEERS=DIR, BENCH="--rounds 5")
	@$(if $(PEERS),test -x "$(PEERS)/hf/bin/python" || { $(PYTHON) -m venv "$(PEERS)/hf" && \
	  "$(PEERS)/hf/bin/pip" install -q -c constraints.txt torch transformers accelerate; })
	@$(if $(PEERS),test -x "$(PEERS)/litgpt/bin/python" || { $(PYTHON) -m venv "$(PEERS)/litgpt" && \
	  "$(PEERS)/litgpt/bin/pip" install -q torch==2.13.0 && "$(PEERS)/litgpt/bin/pip" install -q litgpt; })
	$(BIN)/python bench/train_speed.py $(if $(PEERS),--peers "$(PEERS)") $(BENCH)

bench-tp: setup ## host time of one eager tensor-parallel layer beside PyTorch's DTensor way
	$(BIN)/python bench/tp_layer.py

bench-gpu: setup ## MFU on one GPU, predicted beside measured, beside peers (TINY=1: small, on the CPU; PEERS=DIR)
	$(BIN)/python bench/gpu/mfu.py $(if $(TINY),--tiny) $(if $(PEERS),--peers "$(PEERS)")

# RUNS: CSV files of published runs; MEMORY: layouts that ran out of memory; CALCULON: a checkout of the peer, to stand beside.
bench-planner: setup ## the performance model on runs it has not seen; writes docs/accuracy.md (RUNS="A.csv B.csv" MEMORY=C.csv)
	$(if $(CALCULON),mkdir -p build && $(BIN)/python bench/peers/calculon_rows.py --calculon "$(CALCULON)" \
	  $(if $(CALCULON_PYTHON),--calculon-python "$(CALCULON_PYTHON)") $(RUNS) > build/calculon.json)
	$(BIN)/python bench/planner_accuracy.py $(RUNS) $(if $(MEMORY),--memory $(MEMORY)) \
	  $(if $(CALCULON),--peer calculon=build/calculon.json) --doc docs/accuracy.md

calibrate: setup ## fit the catalog's calibration to published runs (RUNS="A.csv B.csv")
	$(BIN)/python bench/calibrate.py $(RUNS) --out src/bloomery/spec/catalog/calibration.yaml

bench-search: setup ## layouts a second on one core (CALCULON=DIR CALCULON_PYTHON=PYTHON: beside calculon's)
	$(BIN)/python bench/search_speed.py $(if $(CALCULON),--calculon "$(CALCULON)" --cross-check) \
	  $(if $(CALCULON_PYTHON),--calculon-python "$(CALCULON_PYTHON)")

bench-time-to-loss: setup ## our recipe beside the reference's: seconds to its loss (CORPUS=DIR NANOCHAT=DIR; QUICK=1: only that it runs)
	$(BIN)/python bench/time_to_loss.py --corpus "$(CORPUS)" --ablate $(if $(QUICK),--quick) $(if $(NANOCHAT),--nanochat "$(NANOCHAT)")

bench-network: setup ## plans and runs over links of 100 Mbit, 1 Gbit and 5 Gbit between two hosts (needs root and iproute2)
	$(BIN)/python bench/shaped_links.py $(BENCH)

clean: ## remove the environment and everything generated
	rm -rf .venv machine.yaml runs build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
