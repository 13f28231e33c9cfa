# make demo    draws an image set, trains a small detector on it, compresses it to an int8 file and makes a page about
#              it all (five minutes on two cores); killed, it goes on where it was
# make test    runs the tests
# make lint    runs the linter and the format check
# make setup   only builds .venv with what the scripts need
# make clean   removes .venv and runs/demo, and nothing else
#
# Each sets up what it needs: python3 (3.10 or newer) and make are enough. The second time it starts at once.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?= -q -n 2 -m "not slow"

VENV := .venv
RUN := $(VENV)/bin/python
PIP_INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

DEMO := runs/demo
DEMO_CFG := cfg/demo.cfg
DEMO_FLAGS ?= --recipe data/recipes/demo.yaml

.PHONY: help setup demo test lint clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.run.stamp

# pip is the last thing that venv makes, so an interrupted set-up is taken up again.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: $(PYTHON) is older than 3.10; say make PYTHON=python3.12 with one that is not" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }

$(VENV)/.run.stamp: requirements.txt constraints.txt | $(VENV)/bin/pip
	@echo "setting up $(VENV) from requirements.txt; the first time takes some minutes" >&2
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.export.stamp: requirements.txt requirements-export.txt constraints.txt | $(VENV)/bin/pip
	@echo "setting up $(VENV) from requirements.txt and requirements-export.txt; the first time takes some minutes" >&2
	@$(PIP_INSTALL) -r requirements.txt -r requirements-export.txt
	@touch $(VENV)/.run.stamp $@

# All at once, so that pip chooses one version that suits every file.
DEV = requirements-dev.txt requirements-export.txt requirements-search.txt requirements-tflite.txt
$(VENV)/.dev.stamp: requirements.txt $(DEV) constraints.txt | $(VENV)/bin/pip
	@echo "setting up $(VENV) for tests and export; the first time takes some minutes" >&2
	@$(PIP_INSTALL) $(DEV:%=-r %)
	@touch $(VENV)/.run.stamp $(VENV)/.export.stamp $@

# What is finished is not made again; `make clean` begins anew.
demo: $(VENV)/.export.stamp
	$(RUN) -m utils.data.toy --output $(DEMO)/data
	$(RUN) compress.py --cfg $(DEMO_CFG) --data $(DEMO)/data/toy.data $(DEMO_FLAGS) --project $(DEMO) --name journey
	@rm -rf $(DEMO)/detect
	$(RUN) detect.py --weights $(DEMO)/journey/int8/model.onnx --source "$(DEMO)/data/images/val_0000*.jpg" --output $(DEMO)/detect
	@echo "pictures with boxes: $(DEMO)/detect; the page: $(DEMO)/journey/report/report.html"

# One thread in each of the workers of pytest-xdist: more would fight for the same cores.
test: $(VENV)/.dev.stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.dev.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) $(DEMO)
