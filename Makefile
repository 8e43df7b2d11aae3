# Two commands: `make tables` regenerates Tables I-III on the embedded corpus, `make test` passes the tests.
# Each creates the environment in .venv first; nothing but Python 3.11 and make is needed.
PYTHON ?= python3.11
EVENTS ?= $(CMLF_ESC_DIR)
ARGS   ?=
BIN    := .venv/bin

CAPTIONS ?= $(CMLF_AUDIOCAPS_CSV)

.PHONY: tables field test lab rehearsal mining export clean

tables: .venv/installed
	$(BIN)/cmlf reproduce --profile mini $(ARGS)

field: .venv/installed
	@test -n "$(EVENTS)" || { echo "make field: say where the recordings are: make field EVENTS=/path/to/ESC-10" >&2; exit 2; }
	$(BIN)/cmlf reproduce --profile field --events "$(EVENTS)" $(ARGS)

test: .venv/dev
	cd nbs && OMP_NUM_THREADS=1 ../$(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lab: .venv/lab
	$(BIN)/jupyter lab nbs/index.ipynb

# the AudioCaps path at full size, with the real captions and stand-in sounds
rehearsal: .venv/dev
	@test -n "$(CAPTIONS)" || { echo "make rehearsal: say where the AudioCaps csv files are: make rehearsal CAPTIONS=/path/to/csv_files" >&2; exit 2; }
	$(BIN)/python benchmarks/rehearsal.py --captions "$(CAPTIONS)"

# mining against its competitors, on the real captions
mining: .venv/dev
	@test -n "$(CAPTIONS)" || { echo "make mining: say where the AudioCaps csv files are: make mining CAPTIONS=/path/to/csv_files" >&2; exit 2; }
	$(BIN)/python benchmarks/mining.py --captions "$(CAPTIONS)"

# after editing a notebook
export: .venv/dev
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e .
	@touch $@

.venv/dev: .venv/installed
	$(BIN)/python -m pip install -q -e '.[dev,data]'
	@touch $@

.venv/lab: .venv/dev
	$(BIN)/python -m pip install -q -e '.[dev,data,lab]'
	@touch $@

clean:
	rm -rf .venv runs
