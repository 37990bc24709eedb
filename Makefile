# SPDX-License-Identifier: Apache-2.0
# make demo: pictures, shapes and a video of three avatars, in demo-out. make test: all tests. Both set up .venv first.
PYTHON ?= python3
OUT ?= demo-out
SEEDS ?= 10,8,21
SHAPE_SEED ?= 10
TEST_PROCESSES ?= 2
BIN := .venv/bin
RUN := $(BIN)/python
AVATAR := --network=data/demo/next3d_demo.pkl --trunc=0.7 --outdir=$(OUT)
HEAD := --lms_cond=True --obj_path=data/demo/demo.obj --lms_path=data/demo/demo_kpt2d.txt

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(RUN) gen_sheets.py $(AVATAR) --seeds=$(SEEDS)
	$(RUN) gen_samples.py $(AVATAR) $(HEAD) --seeds=$(SEEDS) --depth
	$(RUN) gen_samples.py $(AVATAR) $(HEAD) --seeds=$(SHAPE_SEED) --shapes=true --shape-res=128
	$(RUN) gen_samples.py $(AVATAR) $(HEAD) --seeds=$(SHAPE_SEED) --shapes=true --shape-res=128 --shape-format=.glb
	$(RUN) reenact_avatar_next3d.py $(AVATAR) --lms_cond=True --seeds=$(SEEDS) --grid=4x1 --drive_root=data/demo/clip \
	  --fname=talking.mp4
	@echo "Open in $(OUT): expressions.png and cameras.png, pictures with depth seed*.png, a talking clip talking.mp4,"
	@echo "a surface seed*.glb (Blender or any glTF viewer), a density seed*.mrc (ChimeraX, surface level 10)"

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --timeout=600 tests

clean:
	rm -rf .venv $(OUT)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python requirements.txt
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-metrics.txt requirements-viewer.txt
	$(RUN) -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@
