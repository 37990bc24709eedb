# SPDX-License-Identifier: Apache-2.0
# make demo: pictures and a shape from a small network, in demo-out. make test: all tests. Both set up .venv first.
PYTHON ?= python3
OUT ?= demo-out
BIN := .venv/bin
RUN := $(BIN)/python

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: .venv/installed
	mkdir -p $(OUT)
	$(RUN) make_demo_network.py --out=$(OUT)/demo_network.pkl
	$(RUN) gen_samples.py --network=$(OUT)/demo_network.pkl --obj_path=data/demo/demo.obj \
	  --lms_path=data/demo/demo_kpt2d.txt --lms_cond=True --seeds=0-2 --trunc=0.7 --depth --outdir=$(OUT)
	$(RUN) gen_samples.py --network=$(OUT)/demo_network.pkl --obj_path=data/demo/demo.obj \
	  --lms_path=data/demo/demo_kpt2d.txt --lms_cond=True --seeds=0 --trunc=0.7 --shapes=true --shape-res=128 \
	  --outdir=$(OUT)
	$(RUN) gen_samples.py --network=$(OUT)/demo_network.pkl --obj_path=data/demo/demo.obj \
	  --lms_path=data/demo/demo_kpt2d.txt --lms_cond=True --seeds=0 --trunc=0.7 --shapes=true --shape-res=128 \
	  --shape-format=.glb --outdir=$(OUT)
	@echo "Open the pictures $(OUT)/seed*.png, the density $(OUT)/seed0000.mrc (ChimeraX), the surface $(OUT)/seed0000.glb"

test: .venv/installed-dev
	$(RUN) -m pytest -q tests

clean:
	rm -rf .venv $(OUT)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python requirements.txt
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(RUN) -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@
