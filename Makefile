# make figures   the main job: the paper's toys simulated and predicted, a small study trained and measured; no download
#                beyond the packages, no GPU
# make beyond    the figures beyond the paper: other losses, optimisers, finite batches, the diagnosis' line; seven minutes
# make test      format, lint, types, tests; `make coverage` says which lines they run
# make study     tables 1 and 2, figures 2, 8 and 10 and the map on real networks, drawn from the results that are here;
#                DATA=cifar10:FOLDER trains anew, with seeds from SEED=3 on: the tables' runs at temperature 0.2
#                in an hour, all with RUNS='*'
# make gpu       everything that is measured on one GPU, in one command of less than nine minutes: DATA=FILE, see
#                benchmarks/gpu.py; with the python3 that is there, nothing is installed
# make peers     speed beside what one would take instead, in one process; their packages are installed for it
# make notebooks the notebooks, in JupyterLab
# make docs      the pages of docs/ and the reference, as a site in build/site; a warning is an error
# make mutants   do the tests notice a broken formula? a sample of mutants, half an hour
# make fuzz      COUNT=200000 damaged files of all formats, of a SEED; half an hour, at low priority; it goes on

PYTHON ?= python3
BIN := .venv/bin
# Many small matrices: threads would only wait for one another.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

PACKAGE := $(wildcard $(addprefix collapse/,*.py */*.py recipes/presets/*.json plots/*.mplstyle))
THEORY := $(wildcard collapse/theory/*.py) collapse/experiment.py $(wildcard collapse/plots/* collapse/results/*.py)
# The longest first, so that two cores end together; DIAGNOSES trains 250 networks, and is run by itself.
STUDY := table1 table2 figure2 figure8 figure10 appendix_d0
NETWORKS := regimes predictors network_theory
DIAGNOSES := beyond/diagnosis
PAPER := figure11 $(filter-out figure11 $(STUDY),$(patsubst experiments/%.py,%,$(wildcard experiments/*.py)))
LONGEST := beyond/propositions networks/linear_digits networks/relaxation_losses
BEYOND := $(LONGEST) $(filter-out $(LONGEST) $(DIAGNOSES),$(patsubst experiments/%.py,%,$(wildcard experiments/beyond/*.py)))
TOYS := $(PAPER) $(BEYOND)

.PHONY: figures paper beyond study gpu peers test coverage notebooks docs mutants fuzz clean FORCE
.DELETE_ON_ERROR:

# The toys are many and use one core each; the digits use both.
figures: .venv/installed
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target paper
	@$(MAKE) --no-print-directory build/digits_command.done
	@echo
	@echo "Look at (figures/README.md says what to see):"
	@for name in $(PAPER) digits digits_command; do echo "  figures/$$name.png"; done
	@echo "Numbers: experiments/results/*.npz and digits_command.json; trained networks: runs/digits/*.safetensors"

paper: $(PAPER:%=build/%.done)

beyond: .venv/installed
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(BEYOND:%=build/%.done)
	@echo
	@echo "Look at (figures/README.md says what to see):"
	@for name in $(notdir $(BEYOND)); do echo "  figures/$$name.png"; done

# A step is done again when its sources changed or one of its files is missing.
missing = $(if $(filter-out $(wildcard $(1)),$(1)),FORCE)
FORCE:

$(TOYS:%=build/%.done): build/%.done: experiments/%.py $(THEORY) | .venv/installed
$(foreach name,$(TOYS),$(eval build/$(name).done: $(call missing,$(foreach end,.png .pdf,figures/$(notdir $(name))$(end)) experiments/results/$(notdir $(name)).npz)))
$(TOYS:%=build/%.done):
	$(BIN)/python $<
	@mkdir -p $(@D) && touch $@

build/digits.done: experiments/networks/digits.py $(PACKAGE) $(call missing,figures/digits.png figures/digits.pdf experiments/results/digits.npz runs/digits/mlp.safetensors) | .venv/installed
	$(BIN)/python experiments/networks/digits.py
	@mkdir -p $(@D) && touch $@

build/digits_command.done: build/digits.done experiments/networks/digits_command.py $(call missing,figures/digits_command.png experiments/results/digits_command.json)
	$(BIN)/python experiments/networks/digits_command.py
	@touch $@

SEED ?= 3
RUNS ?= none-s? mlp-s? linear-s? directclr-s? orthogonal-s? diagonal-s? lowrank-s? \
    linear-strength* linear-depth* directclr-d*-s0 choice-none-* choice-mlp-*
study: FLAGS = $(if $(DATA),--seed $(SEED))
study: .venv/installed
	$(if $(DATA),$(BIN)/python experiments/networks/study.py --data $(DATA) $(FLAGS) --only $(RUNS:%='%'))
	@for name in $(STUDY) $(NETWORKS:%=networks/%); do $(BIN)/python experiments/$$name.py $(FLAGS) || exit; done
	$(if $(DATA),,@for name in table1 figure8; do \
	    $(BIN)/python experiments/$$name.py --preset tiny-imagenet-narrow || exit; done)

gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(if $(DATA),--data $(DATA)) $(FLAGS)

peers: .venv/installed-peers
	$(BIN)/python benchmarks/peers.py --out benchmarks/results/peers.json $(FLAGS)

test: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

# Tracing makes the suite about twice as long.
coverage: .venv/installed-test
	$(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term

notebooks: .venv/installed-notebooks
	$(BIN)/jupyter-lab --ServerApp.root_dir=. notebooks/1_strong_augmentation.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Serve it, and open http://localhost:8000 (from the file system the pages open without search):"
	@echo "  $(BIN)/python -m http.server -d build/site"

mutants: .venv/installed-mutants
	$(BIN)/python tests/mutants.py

COUNT ?= 200000
fuzz: .venv/installed-test
	nice -n 19 $(BIN)/python tests/fuzzing/fuzz.py --count $(COUNT) --seed $(SEED) --out benchmarks/results/fuzz.json

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("collapse needs Python 3.10 or newer; give one as PYTHON=...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(addprefix .venv/installed-,test notebooks docs mutants peers): .venv/installed-%: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --editable ".[$*]"
	@touch $@ .venv/installed

clean:
	rm -rf build runs .venv
