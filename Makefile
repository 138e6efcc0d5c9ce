# The front door: `make demo` and `make test` need Python ≥ 3.11, git and make, and build .venv themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint schema bench clean

demo: $(VENV)/ready
	$(BIN)/ddpm shard shards/digits.zip --out shards/digits --size 8 --channels 1
	$(BIN)/ddpm train --config configs/demo.yaml
	$(BIN)/ddpm sample runs/demo --seeds 0-499 --out samples/demo --grid samples/demo.png
	@printf '%s\n' '' \
	  'The grid of samples   samples/demo.png' \
	  'TensorBoard           $(BIN)/tensorboard --logdir runs/demo/tensorboard' \
	  'The shard set         shards/digits   (format: shards/README.md)' \
	  'With your own pictures, on one GPU or more:' \
	  '  $(BIN)/ddpm shard PICTURES --out shards/mine --size 64' \
	  '  $(BIN)/accelerate launch -m pipeline.train --config configs/64px.yaml data.shards=shards/mine run.dir=runs/mine' \
	  '  $(BIN)/ddpm sample runs/mine --seeds 0-999 --out samples/mine --grid samples/mine.png'

test: $(VENV)/ready
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

schema: $(VENV)/ready  ## after a change of pipeline/config.py
	$(BIN)/python -c "import json, pipeline.config as c; print(json.dumps(c.Config.model_json_schema(), indent=1))" > configs/config.schema.json

bench: $(VENV)/ready
	$(BIN)/python benchmarks/demo_quality.py

clean:
	rm -rf $(VENV) runs/demo samples/demo samples/demo.png shards/digits

# torch first and alone: its pin keeps the other packages from choosing another build.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
