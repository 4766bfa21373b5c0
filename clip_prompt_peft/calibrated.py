"""What a classifier knows of its own reliability: the temperature of its logits, and the scores of conformal sets.

Both belong to the prompt adapter or class head in effect and are saved with it, or to the classifier itself if there
is none. They are made by `evaluation.calibration` and `evaluation.conformal`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from .pretrained import PretrainedClassifierMixin
from .tuner.base_config import ClassifierAdapterConfig, check_conformal_scores, check_temperature
from .tuner.base_layer import CLIPPromptLayer


logger = logging.getLogger(__name__)


class CalibratedClassifierMixin(PretrainedClassifierMixin):
    """
    Temperature and conformal scores of a classifier. [`~modeling.PromptClassificationMixin`] applies the temperature.

    With a prompt adapter or class head in effect, they stand in its configuration (`temperature`, `conformal_scores`),
    and otherwise in the config of the classifier (`logit_temperature`, since transformers keeps `temperature` for the
    generation of texts, and `conformal_scores`).
    """

    @property
    def temperature(self) -> float | None:
        """The number T by which logits are divided in evaluation; `None` for 1. Training does not use it."""
        temperature = self._calibration("temperature")
        check_temperature(temperature)
        return temperature

    def set_temperature(self, temperature: float | None) -> None:
        """Sets the temperature of the adapter in effect, or that of the classifier if there is none.

        Args:
            temperature (`float`, *optional*):
                From 0.001 to 1000. `None` removes it.

        Raises:
            ValueError: If it is no such number, or several prompt adapters are in effect together.
        """
        check_temperature(temperature)
        self._set_calibration("temperature", None if temperature is None else float(temperature))  # of NumPy, too

    @property
    def conformal_scores(self) -> dict | None:
        """The scores of [`~evaluation.conformal.ConformalClassifier`] for the adapter in effect, or the classifier."""
        return self._calibration("conformal_scores")

    def set_conformal_scores(self, scores: dict | None) -> None:
        """Sets these scores, which [`~evaluation.conformal.ConformalClassifier.fit`] does. `None` removes them."""
        check_conformal_scores(scores)
        self._set_calibration("conformal_scores", scores)

    def _adapter_configs(self) -> list[ClassifierAdapterConfig]:
        """Returns the configurations of the prompt adapters and class heads in effect."""
        places = self.text_embeddings, self.class_head
        return [config for place in places for config in getattr(place, "configs_in_effect", [])]

    def _calibration(self, name: str):
        configs = self._adapter_configs()
        if not configs:
            return getattr(self.config, _name_in(self.config, name), None)
        return getattr(configs[0], name) if len(configs) == 1 else None  # several together are another model

    def _set_calibration(self, name: str, value) -> None:
        configs = self._adapter_configs()
        if len(configs) > 1:
            raise ValueError(
                f"{len(configs)} adapters are in effect together, and {name} would belong to none of them "
                "alone; activate one of them, or merge them first."
            )
        if configs:
            setattr(configs[0], name, value)
            if not configs[0].has_weights:  # another adapter that is made from this configuration starts without it
                configs[0].set_at_injection[name] = value
            return
        if value is not None and self._has_other_adapters():
            logger.warning(
                "The adapter in effect is one of peft's own and has no place for %s, so it is kept in "
                "model.config of the classifier in memory: the adapter is saved without it, and it stays in effect if "
                "the adapter is switched off. Merge the adapter (merge_and_unload) before calibrating and save the "
                "classifier, or set it again after loading, with model.%s(...).",
                name,
                f"set_{name}",
            )
        _set(self.config, _name_in(self.config, name), value)

    def _has_other_adapters(self) -> bool:
        layers = (part for part in self.modules() if isinstance(part, BaseTunerLayer))
        others = (layer for layer in layers if not isinstance(layer, CLIPPromptLayer))
        return any(layer.active_adapters and not layer.disable_adapters for layer in others)

    def _forget_temperatures(self, class_names: Sequence[str]) -> None:
        """Removes the temperatures of the classifier and of the adapter in effect if their classes are replaced."""
        configs: list = [self.config, *self._adapter_configs()[:1]]
        for config in configs:
            own, name = config.class_names, _name_in(config, "temperature")
            temperature = getattr(config, name, None)
            if temperature is not None and own is not None and set(own) != set(class_names):
                _set(config, name, None)
                warnings.warn(
                    f"The temperature {temperature:.4g} was fitted for other class names, and is removed: "
                    "probabilities of the new classes are not calibrated. Call fit_temperature again with validation "
                    "images of these classes, or set_temperature to keep it.",
                    UserWarning,
                    stacklevel=3,
                )

    def _adopt_calibration(self, config: ClassifierAdapterConfig | None) -> None:
        """Takes over what is known of an adapter that is merged for good; nothing is known of several together."""
        for name in ("temperature", "conformal_scores"):
            _set(self.config, _name_in(self.config, name), config and getattr(config, name))


def _set(config, name: str, value) -> None:
    """Sets a field; in the config of a classifier, which writes every attribute to its file, `None` removes it."""
    if value is not None or isinstance(config, PeftConfig):
        setattr(config, name, value)
    elif hasattr(config, name):
        delattr(config, name)


def _name_in(config, name: str) -> str:
    """Returns the name of a field in the configuration of an adapter, or in the config of a classifier."""
    return name if isinstance(config, PeftConfig) or name != "temperature" else "logit_temperature"
