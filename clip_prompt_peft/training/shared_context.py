"""Which classifiers can be adapted at test time, and the context of theirs that can be tuned."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..modeling import PromptClassificationMixin
from ..templates import context_text
from ..text.cache import Memo
from ..towers import text_side
from ..tuner import CLIPPromptTuningConfig
from ..tuner.base_config import MULTI_LABEL
from ..tuner.layout import PromptLayout, resolve


def check_mode(classifier: PromptClassificationMixin) -> None:
    """Raises `ValueError` in training mode."""
    if any(module.training for module in classifier.modules()):
        raise ValueError(
            "Tuning at test time is inference, but the model is in training mode; call model.eval() first."
        )


def check_softmax(classifier: PromptClassificationMixin) -> None:
    """Raises `ValueError` if an image can have several labels, for then there is no entropy over the classes."""
    layout = classifier.prompt_layout
    if MULTI_LABEL in (classifier.config.problem_type, layout and layout.problem_type):
        raise ValueError(
            f"The classifier has problem_type={MULTI_LABEL!r}, but the entropy of a prediction, which is minimized at "
            "test time, needs exactly one label for each image."
        )


def check_logits(classifier: PromptClassificationMixin) -> None:
    """Raises `ValueError` if an adapter behind the towers changes the logits."""
    like = classifier.logit_scale.detach()
    embeds = like.new_ones(1, classifier.embed_width)
    logits = like.new_zeros(1, len(classifier.class_names or ()))
    if classifier.class_head(embeds, logits, classifier.class_names) is not logits:
        raise ValueError(
            "An active adapter adds to the logits behind the class embeddings, which is not adapted at test time; "
            "disable it, or switch to an adapter with text vectors."
        )


def check_class_embeds(classifier: PromptClassificationMixin) -> None:
    """Raises `ValueError` if an adapter brings class embeddings of its own."""
    shape = (len(classifier.class_names or ()), classifier.embed_width)
    made = classifier.logit_scale.detach().new_zeros(shape)
    if classifier.class_head.class_embeds(classifier.class_names, lambda: made) is not made:
        raise ValueError(
            "An active adapter has class embeddings of its own, which no context can be tuned for; disable it, or "
            "switch to an adapter with text vectors."
        )


def shared_context(classifier: PromptClassificationMixin, layouts: Memo) -> tuple[PromptLayout, torch.Tensor | None]:
    """Returns the layout of the context that all classes and images share, and its vectors (n, D).

    The vectors are `None` if they are those of the words of the template.

    Args:
        classifier (`PromptClassificationMixin`):
            The classifier.
        layouts (`Memo`):
            Remembers the layout of a template.

    Raises:
        ValueError: If there is no such context, or its tower cannot be run with others.
    """
    if any("forward" in vars(module) for part in text_side(classifier) for module in part.modules()):
        raise ValueError(
            "The text tower is offloaded, or spread over several devices, by hooks of accelerate, so it cannot be run "
            "with tuned contexts; load the model onto one device, without device_map."
        )
    layout, embeddings = classifier.prompt_layout, classifier.text_embeddings
    classifier.class_prompts  # noqa: B018  (raises if there are no class names, and reads the tokenizer)
    check_class_embeds(classifier)
    if layout is None:
        check_template_counts(classifier)
        key = classifier.prompt_template, classifier.tokenizer
        return layouts.get(key, lambda: _layout_of_template(classifier)), None
    names = [name for name in embeddings.active_adapters if name in embeddings.prompt_layouts]
    obstacle = _obstacle(layout, embeddings, names)
    if obstacle is not None:
        raise ValueError(
            f"Adapter {names[0]!r} cannot be tuned at test time, because {obstacle}. Activate an adapter with text "
            "vectors that all classes and images share (CoOp, KgCoOp, ...), or disable it to start from the words of "
            "the template."
        )
    return layout, embeddings.vectors(names[0])


def _obstacle(layout: PromptLayout, embeddings, names: list[str]) -> str | None:
    configs = [embeddings.prompt_configs.get(name) for name in names]
    obstacles = {
        "it is merged into the model (call unmerge_adapter() first)": bool(embeddings.merged_adapters),
        f"several adapters are active together ({names})": len(names) > 1,
        "it has no vectors in the text": layout.num_virtual_tokens == 0,
        "its vectors differ from class to class": layout.class_specific,
        "its vectors depend on the image already": layout.image_conditioned,
        "its vectors in a deeper layer differ from class to class": layout.class_aware_layer is not None,
        "its vision prompts are maps of its text vectors, so the views would look different after a step": any(
            config is not None and config.vision_prompts_from_text for config in configs
        ),
    }
    return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)


def check_template_counts(classifier: PromptClassificationMixin) -> None:
    """Raises `ValueError` if the class embeddings of a classifier without an adapter are not made of words to tune."""
    if classifier.has_fixed_class_embeds:
        raise ValueError(
            "The classifier has class embeddings from elsewhere (set_class_embeds), which no context can be tuned "
            "for; call set_class_embeds(None) to return to the prompts."
        )
    template = classifier.prompt_template
    if not context_text(template).strip():
        raise ValueError(
            f"The template {template!r} has no words in front of the class name to start from; call "
            "set_prompt_template, for example with 'a photo of a {}.'."
        )


def _layout_of_template(classifier: PromptClassificationMixin) -> PromptLayout:
    """Returns the layout of an adapter whose vectors are the words in front of the class name."""
    config = CLIPPromptTuningConfig(class_names=classifier.class_names, prompt_template=classifier.prompt_template)
    return replace(PromptLayout.of(resolve(config, classifier)), class_names=None)
