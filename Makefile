# Every target works on a fresh machine with python3 and make; a stamp in .venv makes second runs quick.
PYTHON ?= python3
BIN := .venv/bin

# A process for each core, which OpenMP threads would only hold up. Whoever runs out of tests takes half of those that
# another has left, so that a slow file at the end does not keep one core busy alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: demo quick test lint stories

demo: .venv/demo.stamp
	$(BIN)/nugget2d demo

# what to run after every edit: under a minute on two cores
quick: lint
	$(PYTEST) -m "not slow and not e2e"

# everything: under eight minutes on two cores
test: lint
	$(PYTEST)

lint: .venv/test.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy

# A model that others trained, from their file to figures (docs/OFF-THE-SHELF.md); it resumes where it was stopped.
LLAMA2C ?= ../shared/data/model
RUN := runs/stories
RESULTS := benchmarks/results/stories

stories: $(RESULTS)/comparison.json

$(RESULTS)/comparison.json: $(RESULTS)/lora/distortion.md $(RESULTS)/copies/distortion.md
	$(BIN)/python recipes/stories/compare.py $(^:.md=.json) --base $(RUN)/base --data $(RUN)/test.jsonl --out $@

# the table is written last; an interrupted report keeps its cells
$(RESULTS)/%/distortion.md: $(RUN)/%/model/nugget2d.json $(RUN)/test.jsonl
	$(BIN)/nugget2d bench distortion --model $(<D) --data $(RUN)/test.jsonl --out $(@D) \
		--ratios 1,2,3,4,5,6,8,10 --lengths 64

$(RUN)/%/model/nugget2d.json: recipes/stories/%.yaml $(RUN)/train.jsonl $(RUN)/watch.jsonl
	$(BIN)/nugget2d train $<

# the text that training is watched on and the text that is measured once are two texts
$(RUN)/train.jsonl: WRITE := --tokens 500_000 --seed 0
$(RUN)/watch.jsonl: WRITE := --tokens 20_000 --seed 1
$(RUN)/test.jsonl: WRITE := --tokens 100_000 --seed 2
$(RUN)/%.jsonl: $(RUN)/base/model.safetensors
	$(BIN)/python recipes/stories/write.py $(RUN)/base $@ $(WRITE)

$(RUN)/base/model.safetensors: .venv/demo.stamp
	$(BIN)/python recipes/stories/convert.py $(LLAMA2C)/stories260K.bin $(LLAMA2C)/tok512.bin $(@D)

.PRECIOUS: $(RUN)/%.jsonl $(RUN)/%/model/nugget2d.json

.venv/demo.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[bench]"
	touch $@

.venv/test.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[eval,dev]"
	touch $@
