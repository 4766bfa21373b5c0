.PHONY: style quality test test_all docs

style:
	ruff check --fix .
	ruff format .

quality:
	ruff check .
	ruff format --check .
	mypy

test:
	pytest -n 2 --dist loadfile -m "not slow"

test_all:
	pytest -n 2 --dist loadfile

docs:
	python tests/helpers/readme_snippets.py
	mkdocs build --strict
