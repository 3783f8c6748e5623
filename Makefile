# make test         run the test suite
# make lint         check the style
# make quickstart   draw images, fine-tune, sample and evaluate: minutes on a CPU
# make demo         show the quick start's model in the browser, or its base model before that
# make study        compare all methods on the quick start's data, with three seeds each: one to two hours
# make usefulness   measure whether generated glyphs help a classifier, with five seeds: hours
# make study-taxonomy   compare class tables in three tiers with few images per class: hours
# make study-extension  compare ways to add classes to the quick start's adapter: an hour or two
# make study-breadth  compare methods on bases of 1, 2, 5 and 11 blocks: hours
# make tune         tune methods on the quick start's data, each with the same number of trials: hours
# make torture      run the reliability tests in full and write benchmarks/reliability.md
# make gpu          run the tests of a GPU and measure it, in nine minutes, see docs/gpu.md
# make gpu-quick    the same in three minutes, with the most important tests and cases
# make clean        delete the results of quickstart, study, tune and usefulness
# All need only Python 3.11 with pip and install everything else into .venv.

PYTHON ?= python3
PY := .venv/bin/python

Q := quickstart
RUN := $(Q)/run
METHOD := finediffusion
STEPS := 800
ADAPTER := $(RUN)/adapters/0000800.safetensors
SCALES := 1 2 4
TINY := --image-size 64 --vae examples/glyphs/vae

.PHONY: test torture lint gpu gpu-quick quickstart demo study study-taxonomy study-extension study-breadth tune usefulness clean

test: .venv/installed
	$(PY) -m pytest -q -n 2 --dist loadfile

torture: .venv/installed
	$(PY) -m pytest -q -n 2 --dist loadfile -m reliability --torture --figures=benchmarks/reliability.md

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# GPU_PY is the Python of a node without a network, REFERENCE a checkout of the official code, NAME that of the results.
# The exit code is that of the tests.
GPU_PY := $(PY)
GPU_BENCH = $(GPU_PY) -m benchmarks.gpu --tests .gpu-tests.xml $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(NAME),--name $(NAME))
GPU_TESTS = $(GPU_PY) -m pytest -q -m gpu tests/gpu --durations=8 --junitxml=.gpu-tests.xml
GPU_FEW := attention or layout or forward or gradients or waits or pictures

gpu: $(if $(filter $(PY),$(GPU_PY)),.venv/installed)
	rm -f .gpu-tests.xml
	FD_GPU=1 FD_GPU_SECONDS=180 timeout -s INT -k 20 210 $(GPU_TESTS); tests=$$?; $(GPU_BENCH) --minutes 5; exit $$tests

gpu-quick: $(if $(filter $(PY),$(GPU_PY)),.venv/installed)
	rm -f .gpu-tests.xml
	FD_GPU=1 FD_GPU_SECONDS=45 timeout -s INT -k 10 60 $(GPU_TESTS) -k "($(GPU_FEW)) and not compiled"; tests=$$?; \
	  $(GPU_BENCH) --quick --minutes 2; exit $$tests

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check uv
	.venv/bin/uv pip install -q --python $(PY) -r requirements.txt -r pyproject.toml --extra dev
	touch $@

# training flags of the quick start, without data, method and folder
TRAIN := $(TINY) --no-flip --num-workers 0 --model DiT-Ti/2 --resume examples/glyphs/base.safetensors --global-batch-size 64 \
  --max-steps $(STEPS) --lr 1e-3 --table-lr 1e-2 --table-init mean --table-std 0.1 --lr-schedule cosine --ema-decay 0.99
READER := --features $(Q)/reading/features.pt --classifier $(Q)/reading/reader.pt --inception none --lpips-trunk none

$(Q)/train: | .venv/installed
	$(PY) -m examples.glyphs.draw --set new --per-class 39 --out $(Q)/train
	$(PY) -m examples.glyphs.draw --set new --faces held-out --per-class 6 --out $(Q)/held-out

quickstart: .venv/installed
	rm -rf $(Q)
	$(MAKE) $(Q)/train
	$(PY) -m tools.encode_latents --data-path $(Q)/train $(TINY) --no-flip --num-workers 0 --out $(Q)/latents
	$(PY) train.py --latents $(Q)/latents $(TRAIN) --method $(METHOD) --results-dir $(Q) --experiment run
	for w in $(SCALES); do $(PY) sample.py --ckpt $(ADAPTER) --classes all --per-class 4 --cfg-scale $$w \
	  --sampler ddim --num-sampling-steps 20 --batch-size 64 --sample-dir $(Q)/w$$w || exit; done
	$(PY) -m examples.glyphs.read --train $(Q)/train --real $(Q)/held-out --out $(Q)/reading \
	  --generated $(foreach w,$(SCALES),"w = $(w)=$(Q)/w$(w)")
	for w in $(SCALES); do $(PY) evaluate.py $(Q)/held-out $(Q)/w$$w $(READER) --num-workers 0 \
	  --output $(Q)/evaluation/w$$w || exit; done
	@echo "Look at $(Q)/reading/grid.png: real above generated glyphs."
	@echo "The figures are in $(Q)/reading/figures.json and $(Q)/evaluation/w*/metrics.md."

TUNED := --ckpt $(ADAPTER) --images $(Q)/train
demo: .venv/installed
	$(PY) -m tools.browse $(if $(wildcard $(ADAPTER)),$(TUNED),--ckpt examples/glyphs/base.safetensors $(TINY))

# if they are interrupted, the same command resumes
tune: .venv/installed $(Q)/train
	$(PY) -m examples.glyphs.tune --data $(Q) --out tuning --train "$(TRAIN)"

study: .venv/installed $(Q)/train
	$(PY) -m examples.glyphs.study --data $(Q) --out study --train "$(TRAIN)"

usefulness: .venv/installed $(Q)/train
	$(PY) -m examples.glyphs.usefulness --data $(Q) --out usefulness --train "$(TRAIN)"

study-taxonomy: .venv/installed
	$(PY) -m examples.glyphs.taxonomy_study --out taxonomy --train "$(TRAIN)"

study-extension: .venv/installed $(Q)/train
	$(PY) -m examples.glyphs.extension_study --data $(Q) --out extension --train "$(TRAIN)"

study-breadth: .venv/installed $(Q)/train
	$(PY) -m examples.glyphs.breadth_study --data $(Q) --out breadth --train "$(TRAIN) --max-steps 400"

clean:
	rm -rf $(Q) study tuning usefulness taxonomy extension breadth
