# Three commands: `make demo` searches, `make tables` regenerates Tables I-III on the synthesised corpus, `make test` passes the tests.
# Each creates the environment in .venv first; nothing but Python (3.11, 3.12 or 3.13) and make is needed.
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13,$(if $(shell $(p) -c '$(SUPPORTED)' 2>/dev/null && echo yes),$(p))))
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
EVENTS ?= $(CMLF_ESC_DIR)
QUERY  ?= a dog barks while crickets chirp
SOUNDS ?=
ARGS   ?=
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install -q -c constraints.txt
SITE   := _site

CAPTIONS ?= $(CMLF_AUDIOCAPS_CSV)

.PHONY: demo tables field test reproduced lint lab rehearsal benchmarks mining gpu export notebooks site serve hooks constraints dependencies audit clean

tables: .venv/installed
	$(BIN)/cmlf reproduce --profile mini $(ARGS)

field: .venv/installed
	@test -n "$(EVENTS)" || { echo "make field: say where the recordings are: make field EVENTS=/path/to/ESC-10" >&2; exit 2; }
	$(BIN)/cmlf reproduce --profile field --events "$(EVENTS)" $(ARGS)

test: .venv/dev
	cd nbs && OMP_NUM_THREADS=1 ../$(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# REPRODUCED.md: run its commands on this machine, measure, compare, answer (quick parts only: ARGS="--profile smoke")
reproduced: .venv/dev
	$(BIN)/python tools/reproduced.py $(ARGS)

# names that do not resolve, imports that nobody uses, and other errors that can be seen without running
lint: .venv/dev
	$(BIN)/ruff check

# search the synthesised corpus with the packaged model; then a folder of your own: make demo SOUNDS=/path/to/sounds
DEMO := runs/demo
demo: .venv/search
	@if [ -z "$(SOUNDS)" ] && [ ! -f $(DEMO)/sounds/manifest.csv ]; then \
		$(BIN)/cmlf data --profile mini --out $(DEMO)/sounds --split test > /dev/null; fi
	$(BIN)/cmlf index "$(or $(SOUNDS),$(DEMO)/sounds)" --model demo --out $(DEMO)/$(if $(SOUNDS),own,index)
	@$(BIN)/cmlf search $(DEMO)/$(if $(SOUNDS),own,index) "$(QUERY)" -k 5
	@echo "more: .venv/bin/cmlf search $(DEMO)/$(if $(SOUNDS),own,index) \"your sentence\", or in a browser: .venv/bin/cmlf serve $(DEMO)/$(if $(SOUNDS),own,index)"

lab: .venv/lab
	$(BIN)/jupyter lab nbs/index.ipynb

# the AudioCaps path at full size, with the real captions and stand-in sounds
rehearsal: .venv/dev
	@test -n "$(CAPTIONS)" || { echo "make rehearsal: say where the AudioCaps csv files are: make rehearsal CAPTIONS=/path/to/csv_files" >&2; exit 2; }
	$(BIN)/python benchmarks/rehearsal.py --captions "$(CAPTIONS)"

# log-mels, training and evaluation against plain ways to do them
benchmarks: .venv/dev
	$(BIN)/python benchmarks/features.py --events "$(EVENTS)"
	$(BIN)/python benchmarks/training.py --captions "$(CAPTIONS)"
	$(BIN)/python benchmarks/evaluation.py

# mining against its competitors, on the real captions
mining: .venv/dev
	@test -n "$(CAPTIONS)" || { echo "make mining: say where the AudioCaps csv files are: make mining CAPTIONS=/path/to/csv_files" >&2; exit 2; }
	$(BIN)/python benchmarks/mining.py --captions "$(CAPTIONS)"

# training on a GPU: agreement with the CPU, clips per second; with EVENTS also the tables of `field`
# (without a GPU: make gpu ARGS="--device cpu --small")
gpu: .venv/dev
	$(BIN)/python benchmarks/gpu.py --events "$(EVENTS)" $(ARGS)

# after editing a notebook: write the modules, clean the notebooks
export: .venv/dev
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean

# execute the notebooks whose code changed (or those of ARGS: make notebooks ARGS="03_data 07_mining", or ARGS=--all)
notebooks: .venv/dev
	$(BIN)/python tools/notebooks.py $(ARGS)

# the documentation, as a folder of pages that need nothing from elsewhere
site: .venv/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir $(SITE)
	$(BIN)/python tools/links.py $(SITE)

serve: .venv/site
	$(BIN)/python -m mkdocs serve

# before a commit: ruff, and notebooks cleaned on save in Jupyter
hooks: .venv/dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_install_hooks
	$(BIN)/pre-commit install

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed, and none was found: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "Python 3.11, 3.12 or 3.13 is needed, not $(PYTHON): make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

.venv/search: .venv/installed
	$(PIP) -e '.[search]'
	@touch $@

.venv/dev: .venv/installed
	$(PIP) -e '.[dev,data,words,cluster,devices,search]'
	@touch $@

.venv/site: .venv/dev
	$(PIP) -e '.[dev,data,words,cluster,devices,search,site]'
	@touch $@

.venv/lab: .venv/dev
	$(PIP) -e '.[dev,data,words,cluster,devices,search,lab]'
	@touch $@

# newer versions of everything: a fresh environment without constraints, frozen
constraints: .venv/bin/python
	rm -rf .venv-new && $(BIN)/python -m venv .venv-new
	.venv-new/bin/python -m pip install -q -e '.[dev,data,words,cluster,devices,search,lab,site]'
	{ grep '^#' constraints.txt; .venv-new/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; grep ';' constraints.txt; } > constraints.new
	mv constraints.new constraints.txt && rm -rf .venv-new

# the list of all packages with their licences, docs/dependencies.md (after `make constraints`)
dependencies: .venv/dev
	$(BIN)/python -m pip install -q 'pip>=25.1'
	$(BIN)/python tools/dependencies.py

# known vulnerabilities of these versions: by pip-audit if it is installed, or make audit ARGS=/path/to/advisory-database
audit: .venv/dev
	$(BIN)/python tools/audit.py $(ARGS)

clean:
	rm -rf .venv .venv-new .cache $(SITE) runs
