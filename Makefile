PYTHON ?= python3
PY := .venv/bin/python
PYTEST := $(PY) -m pytest -q
# Two workers, each with half of the files in their order: what a file's tests share is made once, not by both.
WORKERS := -n 2 --dist worksteal

# Of the demo's page, by name: gradio asks for a Pillow below 13, which resizes some images otherwise than the one that
# the goldens were made with. It runs with 13 too.
GRADIO := brotli gradio gradio_client groovy hf-gradio orjson pydub python-multipart pytz safehttpx semantic-version tomlkit

export HF_HUB_OFFLINE := 1
# What is imported is compiled once and kept, pytest's rewritten tests too: half a minute of every run of the suite. So pip
# need not compile every file of every package, which takes a minute. (`PIP_NO_COMPILE=1` would mean the opposite.)
export PYTHONDONTWRITEBYTECODE :=
PIP_INSTALL := $(PY) -m pip install -qq --no-compile -c constraints.txt

.PHONY: demo docs test test-all check fuzz lint test-transformers conformance coverage mutate bench clean

demo: .venv/.installed
	$(PY) examples/demo.py

# The documentation's site, into `site`
docs: export NO_MKDOCS_2_WARNING := 1
docs: .venv/.installed
	$(PY) -m mkdocs build --strict

# One thread per worker: two workers with a thread pool each only get in each other's way.
# Ten failures end it: if tests hang, each up to its time limit, their names must still be printed.
test: .venv/.installed .venv/.quantise .venv/.lmms-eval
	OMP_NUM_THREADS=1 $(PYTEST) $(WORKERS) --maxfail 10

# Also what CI has no time for, but for mutation testing
test-all: export RUN_SLOW := 1
test-all: export LLAVA_WHOLE := 1
test-all: lint test-transformers coverage

check: lint .venv/.quantise
	OMP_NUM_THREADS=1 $(PYTEST) $(WORKERS) -x -m "not slow"

lint: .venv/.installed
	.venv/bin/ruff check --output-format concise .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mlinter --no-progress src

# All cases of what `make test` runs a tenth of, with their numbers; several minutes.
fuzz: .venv/.installed
	LLAVA_WHOLE=1 OMP_NUM_THREADS=1 $(PYTEST) -rP tests/fuzz

# transformers' own shared tests on our models; fetches transformers' source distribution from PyPI the first time.
test-transformers: .venv/.installed
	cd tests/transformers_suite && OMP_NUM_THREADS=1 ../../$(PYTEST) -n 2

# Writes what the above saw into docs/conformance.md.
conformance: .venv/.installed
	cd tests/transformers_suite && OMP_NUM_THREADS=1 ../../$(PYTEST) -n 2 --write-tables

# All tests; fails if they run less of the package than pyproject.toml asks for.
coverage: .venv/.installed .venv/.quantise .venv/.lmms-eval
	OMP_NUM_THREADS=1 $(PYTEST) $(WORKERS) --maxfail 10 --cov --cov-report=term

mutate: .venv/.mutate
	OMP_NUM_THREADS=1 $(PY) tests/mutation/mutate.py

bench: .venv/.installed
	$(PY) benchmarks/flops.py
	$(PY) benchmarks/image_processing.py
	$(PY) benchmarks/vision.py
	$(PY) benchmarks/prefill.py
	$(PY) benchmarks/moe_layer.py
	$(PY) benchmarks/mole_step.py
	$(PY) benchmarks/conversion.py

clean:
	rm -rf .venv .cache build dist site src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests examples benchmarks conversion_scripts -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: setup.py constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps $(GRADIO)
	touch $@

.venv/.mutate: .venv/.installed
	$(PIP_INSTALL) -e '.[mutate]'
	touch $@

# Not with the rest: where torchao is installed, importing any transformers model prints its warnings.
.venv/.quantise: .venv/.installed
	$(PIP_INSTALL) -e '.[quantise]'
	touch $@

# lmms-eval without what it asks for, among which torchvision and fifty more packages, but with all that a run imports
.venv/.lmms-eval: .venv/.installed
	$(PIP_INSTALL) evaluate loguru sacrebleu tenacity
	$(PIP_INSTALL) --no-deps lmms-eval
	touch $@
