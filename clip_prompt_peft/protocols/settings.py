"""How the methods are trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class TrainingSettings:
    """
    How all adapters are trained, so that they can be compared: AdamW with a cosine schedule, and no augmentation.

    The linear probe is fitted by scikit-learn instead, and presets can be trained as their papers do.

    Attributes:
        num_train_epochs: rounds over the drawn images.
        batch_size: images in a step.
        learning_rate: of prompts.
        lora_learning_rate: of LoRA.
        paper_recipes: train presets with the optimizer, the epochs and so on of [`training_recipe`].
        lora_rank: of LoRA in the query, key and value of both towers.
        linear_probe_c: scikit-learn's inverse strength of the linear probe's penalty; 0.316 is CLIP's
            (https://arxiv.org/abs/2103.00020, A.3).
        prompt_template: of zero-shot, and of the prompts to start from.
        ensemble: name of the templates of the ensemble, see [`load_templates`].
        when_fewer: about classes with fewer images than shots, see [`sample_few_shot`].
    """

    num_train_epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 2e-3
    lora_learning_rate: float = 1e-3
    paper_recipes: bool = False
    lora_rank: int = 2
    linear_probe_c: float = 0.316
    prompt_template: str = "a photo of a {}."
    ensemble: str = "imagenet"
    when_fewer: str = "error"

    def fingerprint(self, model: str) -> str:
        """Of all settings and the model's name: results under another one are not mixed with these."""
        text = json.dumps({"model": model, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
