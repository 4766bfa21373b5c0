"""The published heads as presets of the configuration, one row for each."""

from __future__ import annotations


# The weights of Tip-Adapter are 1 for all data sets; its authors search them for each set.
HEAD_PRESETS: dict[str, dict] = {
    "2sfs": {"target_modules": "block-layernorms", "starts_later": True, "normalized_start": True},
    "clap": {"pull": True},
    "zs-lp": {},
    "tip-adapter": {"head_type": "cache", "train_keys": False, "normalized_start": True},
    "tip-adapter-f": {"head_type": "cache", "normalized_start": True},
}


def head_settings(name: str) -> dict:
    """Returns the fields of a preset. Raises `ValueError` if the name is unknown."""
    if name not in HEAD_PRESETS:
        raise ValueError(f"There is no head {name!r}; there are {sorted(HEAD_PRESETS)}.")
    return dict(HEAD_PRESETS[name])
