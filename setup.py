"""What depends on the address of the repository; everything else is in setup.cfg."""

import runpy
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
docs = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
repository = docs["REPOSITORY"]
pages = {"Source": "", "Documentation": "/tree/main/docs", "Issues": "/issues", "Changelog": "/blob/main/CHANGELOG.md"}

setup(
    long_description=docs["absolute_links"]((ROOT / "README.md").read_text(encoding="utf-8")),
    project_urls={name: repository + page for name, page in pages.items()} if repository else {},
)
