# make demo: train on the toy world and evaluate before and after.   make test: the tests.
# make test-all: the slow ones as well.   make gpu: what only a GPU can show, in nine minutes.
# All set up .venv first.
PYTHON ?= python3
PY = .venv/bin/python
TOY ?= --clips 60
# Two processes, a file of tests at a time, the longest first.
TESTS = -n 2 --dist loadfile --no-loadscope-reorder tests/test_run.py test_all.py tests

# The toy's tensors are too small to share among threads. Freed memory stays with the process: fetched anew from the
# system, page by page, it would cost a lot at every step.
export OMP_NUM_THREADS = 1
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 100000000000

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip setuptools wheel
	$(PY) -m pip install --quiet -r requirements.txt
	SAM2_BUILD_CUDA=0 $(PY) -m pip install --quiet --no-build-isolation sam2==1.1.0
	touch $@

demo: .venv/installed
	$(PY) eval.py $(TOY) --out out/demo/before --overwrite true
	$(PY) train.py --name demo --overwrite true
	$(PY) eval.py $(TOY) --policy out/demo/policy --out out/demo/after --overwrite true \
		--against out/demo/before/results.json
	$(PY) segment.py --index 49 --policy out/demo/policy --out out/demo/clip
	@echo "look at: out/demo/report.html  out/demo/after/report.html  out/demo/clip/overlay.webp"

test: .venv/installed
	$(PY) -m pytest -q $(TESTS) -m "not slow"

test-all: .venv/installed
	$(PY) -m pytest -q $(TESTS) -m "slow or not slow"

# Such as GPU="--shape 3b --minutes 20".
gpu: .venv/installed
	$(PY) speed/gpu.py $(GPU)

.PHONY: demo test test-all gpu
