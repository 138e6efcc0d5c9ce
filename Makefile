# The front door: `make demo` and `make test` need Python ≥ 3.11, git and make, and build .venv themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Two workers more than cores: many tests wait more than they compute.
PYTEST := $(BIN)/python -m pytest -n $(shell expr $$(getconf _NPROCESSORS_ONLN) + 2) --maxprocesses 8 --dist loadfile --no-loadscope-reorder

BENCHMARKS := "shard_throughput.py --rounds 3" "loader_throughput.py --rounds 2" "checkpoint_stall.py --saves 3" \
  "train_step.py --threads 1" "sampling.py --threads 1" "roofline.py --threads 1" "ddp_scaling.py --rounds 4" "cost.py --threads 1" memory.py \
  "scale.py --quick" "simulated_cluster.py --quick"

PARSERS := tar targz zip npy npz cifar parquet index table record samples sidecar sample foreign manifest result image \
  member places json torch pickle weights diffusers

unexport PYTHONDONTWRITEBYTECODE  # images of Python set it, and every process would compile pipeline/ anew

.PHONY: demo test quick soak fuzz lint schema quality bench clean

demo: samples/demo.png
	@printf '%s\n' '' 'The demo is complete.' \
	  '  grid of samples   samples/demo.png   (all 500: samples/demo)' \
	  '  TensorBoard       $(BIN)/tensorboard --logdir runs/demo/tensorboard' \
	  '  shard set         shards/digits      (its format: shards/README.md)' \
	  'Your own images, on all GPUs of this machine:' \
	  '  $(BIN)/ddpm shard IMAGES --out shards/mine --size 64 --labels none' \
	  '  $(BIN)/accelerate launch -m pipeline.train --config configs/64px.yaml data.shards=shards/mine run.dir=runs/mine' \
	  '  $(BIN)/ddpm sample runs/mine --seeds 0-999 --out samples/mine --grid samples/mine.png'

# Order-only, for what is there is done; each command goes on where an earlier start of it stopped.
samples/demo.png: | runs/demo/DONE
	$(BIN)/ddpm sample runs/demo --seeds 0-499 --out samples/demo --grid $@
runs/demo/DONE: | shards/digits/index.json
	$(BIN)/ddpm train --config configs/demo.yaml
shards/digits/index.json: | $(VENV)/ready
	$(BIN)/ddpm shard shards/digits.zip --out shards/digits --size 8 --channels 1

test: $(VENV)/dev
	$(PYTEST)

quick: $(VENV)/dev  ## under two minutes on 2 cores: no test file of tests/conftest.py's LONG, but one run from images to samples
	$(PYTEST) --quick

soak: $(VENV)/dev  ## 30 SIGKILLs over one run of 3 ranks, and over 3 processes that draw one sample set; half an hour
	DDPM_KILLS=30 $(BIN)/python -m pytest -s --timeout 3600 tests/laws/test_exact_resume.py -k killed_at_any_moment
	DDPM_SEEDS=5000 DDPM_KILLS=30 $(BIN)/python -m pytest -s --timeout 3600 tests/laws/test_seed_identity.py -k killed_at_random

fuzz: $(VENV)/dev  ## a minute for each parser of foreign bytes; what it finds lands in tests/fuzz/corpus
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	for parser in $(PARSERS); do echo "== $$parser"; $(BIN)/python tests/fuzz/fuzz.py $$parser || exit 1; done

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

schema: $(VENV)/dev  ## after a change of pipeline/config.py: the schema, and docs/configuration.md
	$(BIN)/python -c "import json, pipeline.config as c; print(json.dumps(c.Config.model_json_schema(), indent=1))" > configs/config.schema.json.new
	mv configs/config.schema.json.new configs/config.schema.json
	$(BIN)/python -m tests.repo.configuration_page

quality: samples/demo.png $(VENV)/dev  ## do the demo's samples show what they were asked for?
	$(BIN)/python benchmarks/demo_quality.py

bench: $(VENV)/dev  ## what fits a CPU, with the peers in the same run; a quarter of an hour
	for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python benchmarks/$$script || exit 1; done

clean:
	rm -rf $(VENV) runs/demo samples/demo samples/demo.png shards/digits

# torch first and alone: its pin keeps the other packages from choosing another build.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo 'installing torch and this project into $(VENV), once: two minutes, 1.5 GB'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@
$(VENV)/dev: $(VENV)/ready
	@echo 'installing what the tests need into $(VENV), once: two minutes, 0.5 GB'
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
