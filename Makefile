# The commands of a contributor. They run in the active environment.
.PHONY: install test lint docs bench

install: ## the package, its tests, documentation and benchmarks, in the tested versions
	pip install -c constraints.txt -e ".[test,ocr,plot,bench,docs]"

test: ## everything; ARGS='-m "not slow"' leaves out whole runs
	python -m pytest -n auto --dist loadgroup $(ARGS)

lint:
	ruff check
	ruff format --check
	mypy
	lint-imports --no-cache

docs: ## into site/
	mkdocs build --strict

bench: ## the group advantages on this machine; benchmarks/gpu.sh OUT for a GPU
	python -m pytest benchmarks/bench_advantages.py --benchmark-json=advantages.json
