"""Zero-shot class embeddings from several texts per class: template ensembles and descriptions.

`set_class_embeds` puts them into the classifier:

```py
>>> model.set_class_embeds(template_ensemble(model, load_templates("imagenet")))
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..modeling import PromptClassificationMixin
from ..templates import CLASS_SLOT, check_template
from ..text import normalize
from ..text.features import features_of_texts
from ..towers import eval_mode


def template_ensemble(model: PromptClassificationMixin, templates: Sequence[str]) -> torch.Tensor:
    """Computes class embeddings from several templates as CLIP does.

    The text embeddings of a class are normalized and averaged, and the mean is normalized again.

    Args:
        model (`PromptClassificationMixin`):
            A classifier with C class names and no active prompt adapter.
        templates (`Sequence[str]`):
            Texts with one `{}` each, which the class names replace.

    Returns:
        `torch.Tensor`: The (C, E) normalized class embeddings.

    Raises:
        ValueError: If there is no template, a template has no `{}`, a text is too long, or a prompt adapter
            or a class head is active.
    """
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates must be a list of texts with one {{}} each, got {templates!r}.")
    for template in templates:
        check_template(template)
    texts = {name: [template.replace(CLASS_SLOT, name) for template in templates] for name in _class_names(model)}
    return _mean_embeds(model, texts)


def description_ensemble(model: PromptClassificationMixin, descriptions: Mapping[str, Sequence[str]]) -> torch.Tensor:
    """Computes class embeddings from several texts about each class, averaged as in [`template_ensemble`].

    Args:
        model (`PromptClassificationMixin`):
            A classifier with C class names and no active prompt adapter.
        descriptions (`Mapping[str, Sequence[str]]`):
            Complete sentences for each class name.

    Returns:
        `torch.Tensor`: The (C, E) normalized class embeddings.

    Raises:
        ValueError: If a class has no descriptions, there are descriptions of an unknown class, a text is too long or
            a prompt adapter or a class head is active.

    Example:

    ```py
    >>> texts = {"owl": ["a photo of an owl, a bird with large eyes."], "cat": ["a cat has whiskers.", "a furry cat."]}
    >>> model.set_class_embeds(description_ensemble(model, texts))
    ```
    """
    class_names = _class_names(model)
    missing = [name for name in class_names if not descriptions.get(name)]
    unknown = [name for name in descriptions if name not in class_names]
    if missing or unknown:
        raise ValueError(
            f"descriptions must have exactly the model's classes: {len(missing)} classes have none ({missing[:5]}), "
            f"{len(unknown)} are no classes of the model ({unknown[:5]})."
        )
    texts = {name: descriptions[name] for name in class_names}
    for name, sentences in texts.items():
        if isinstance(sentences, str):
            raise ValueError(f"The descriptions of {name!r} must be a list of texts, got {sentences!r}.")
    return _mean_embeds(model, texts)


def _class_names(model: PromptClassificationMixin) -> list[str]:
    if model.prompt_layout is not None or model.class_head.configs_in_effect:
        raise ValueError(
            "An ensemble cannot be computed while a prompt adapter or a class head is active, which would answer in "
            "place of it; use it inside `with model.disable_adapter():`."
        )
    if model.class_names is None:
        raise ValueError("The classifier has no class names; call set_class_names([...]) first.")
    return model.class_names


@torch.no_grad()
def _mean_embeds(model, texts: Mapping[str, Sequence[str]]) -> torch.Tensor:
    with eval_mode(model):
        means = [normalize(features_of_texts(model, of_class, name)).mean(dim=0) for name, of_class in texts.items()]
    return normalize(torch.stack(means))  # (C, E)
