"""The versions that results were made with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


PACKAGES = ("clip_prompt_peft", "peft", "transformers", "torch", "datasets")


def environment_versions() -> dict[str, str]:
    """Python and the packages that matter, by name; those that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
