"""The base model of an adapter: recorded when the adapter is made, and compared when it is loaded."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .base_config import PROBLEM_TYPES, ClassifierAdapterConfig
from .fingerprint import check_fingerprint, fingerprint_of
from .hub import COMMIT, HubSettings, hub_settings_of


def check_adapter_name(name: str) -> None:
    """Raises `ValueError` if an adapter cannot have this name."""
    if not name or re.search(r"[./\\\x00]", name):
        raise ValueError(
            f"An adapter cannot be named {name!r}: a module and a folder are named after it, so it must "
            "not be empty nor hold '.', '/' or a backslash."
        )


@contextmanager
def forget_if_refused(tuner: BaseTuner, adapter_name: str) -> Iterator[None]:
    """Removes the configuration of an adapter that could not be put into a model. Otherwise it could be activated, as
    transformers, unlike peft, keeps it."""
    try:
        yield
    except Exception:
        tuner.peft_config.pop(adapter_name, None)
        raise


def config_value(model: nn.Module, name: str):
    """Returns a field of the model's config, or `None`: a module around a CLIP need not have a config."""
    return getattr(getattr(model, "config", None), name, None)


def warn_of_other_classes(config: ClassifierAdapterConfig, model: nn.Module) -> None:
    """Warns if an adapter that was loaded takes the place of other class names, or another kind of labels, of a model.

    Args:
        config (`ClassifierAdapterConfig`):
            The resolved configuration of the adapter.
        model (`torch.nn.Module`):
            The model. Nothing is compared unless it is a classifier that was given class names.
    """
    if not getattr(model, "names_were_given", False):
        return
    adapter, own = config.described, config_value(model, "class_names")
    if own is not None and config.class_names is not None and list(own) != config.class_names:
        warnings.warn(
            f"{_other_classes(adapter, config.class_names, list(own))} While the adapter is active, labels have to be "
            f"numbered by its names (model.config.label2id). {_how_to_keep(config)}",
            UserWarning,
            stacklevel=2,
        )
    kinds = [kind or PROBLEM_TYPES[0] for kind in (config.problem_type, config_value(model, "problem_type"))]
    if kinds[0] != kinds[1]:
        warnings.warn(
            f"The adapter {adapter} was trained with problem_type={kinds[0]!r}, and the model has {kinds[1]!r}, which "
            f"decides on loss and probabilities; set model.config.problem_type = {kinds[0]!r} for the adapter's.",
            UserWarning,
            stacklevel=2,
        )


def _other_classes(adapter: str, names: list[str], own: list[str]) -> str:
    """Says how the class names of an adapter differ from those of the model."""
    pairs = enumerate(zip(names, own))
    at = next((label for label, (name, other) in pairs if name != other), min(len(names), len(own)))
    if sorted(names) == sorted(own):
        return (
            f"The adapter {adapter} brings the class names of the model in another order: label {at} is "
            f"{names[at]!r}, not {own[at]!r} as in the model."
        )
    added, missing = ([name for name in some if name not in others] for some, others in ((names, own), (own, names)))
    parts = [f"{len(some)} {what} ({some[:5]})" for some, what in ((added, "new"), (missing, "missing")) if some]
    numbers = "" if len(names) == len(own) else f"; it has {len(names)} classes instead of {len(own)}"
    return f"The adapter {adapter} brings class names of its own in place of the model's: {', '.join(parts)}{numbers}."


def _how_to_keep(config: ClassifierAdapterConfig) -> str:
    if config.class_specific:
        return "Its vectors belong to its classes; with model.disable_adapter() the model has its own again."
    return "To classify by the model's instead, call model.set_class_names([...]) with these."


def check_base_model(config: ClassifierAdapterConfig, model: nn.Module) -> None:
    """Warns if the model is not the one that an adapter was trained on, by its values or else by its name."""
    adapter, trained_on = config.described, _named_base(config)
    if config.base_model_fingerprint is not None:
        check_fingerprint(config.base_model_fingerprint, model, adapter, trained_on)
        return
    name, revision = getattr(model, "name_or_path", None), hub_settings_of(model).revision
    recorded = config.base_model_name_or_path
    if not name or not recorded or os.path.exists(name) or os.path.exists(recorded):
        return  # a folder may hold any model
    # A branch may be at this commit, so only a commit tells another state.
    is_other_state = (
        revision is not None and COMMIT.fullmatch(config.revision or "") is not None and revision != config.revision
    )
    if name != recorded or is_other_state:
        warnings.warn(
            f"The adapter {adapter} was trained on {trained_on}, and is loaded into {name!r}"
            f"{f' at revision {revision!r}' if revision else ''}. It holds no values of its base model to compare. If "
            "the weights differ, its predictions will be worse than they were; load the base model that it names.",
            UserWarning,
            stacklevel=2,
        )


def name_base_model(config: ClassifierAdapterConfig, model: nn.Module, token_ids: list[list[int]]) -> None:
    """Sets commit, subfolder and fingerprint of the base model; `token_ids` are those of the adapter's texts."""
    hub = hub_settings_of(model)
    if config.revision not in (None, hub.revision) and hub.revision is not None:
        name = getattr(model, "name_or_path", None)
        if _commit_of(name, hub.at(config.revision, hub.subfolder)) != hub.revision:
            warnings.warn(
                f"The configuration says revision={config.revision!r}, but the model was loaded from {name!r} at "
                f"{hub.revision!r}, which is what the adapter names as its base model's revision.",
                UserWarning,
                stacklevel=2,
            )
    config.revision = hub.revision or config.revision
    config.base_model_subfolder = hub.subfolder or None
    config.base_model_fingerprint = fingerprint_of(model, list(chain.from_iterable(token_ids)))


def _commit_of(name: str | None, hub: HubSettings) -> str | None:
    try:
        return hub.pinned(name).revision
    except OSError:  # offline, or no such revision
        return None


def _named_base(config: ClassifierAdapterConfig) -> str:
    revision = f" at revision {config.revision!r}" if config.revision else ""
    return f"{config.base_model_name_or_path!r}{revision}"
