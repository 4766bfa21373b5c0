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
from ..towers import eval_mode, execution_device, num_positions


TEXTS_AT_ONCE = 256


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
        ValueError: If there is no template, a template has no `{}`, a text is too long or a prompt adapter is active.
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
            a prompt adapter is active.

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
    if model.prompt_layout is not None:
        raise ValueError(
            "An ensemble cannot be computed while a prompt adapter is active; use it inside "
            "`with model.disable_adapter():`."
        )
    if model.class_names is None:
        raise ValueError("The classifier has no class names; call set_class_names([...]) first.")
    return model.class_names


@torch.no_grad()
def _mean_embeds(model, texts: Mapping[str, Sequence[str]]) -> torch.Tensor:
    embeds = []
    with eval_mode(model):
        for name, sentences in texts.items():
            starts = range(0, len(sentences), TEXTS_AT_ONCE)
            parts = [_encode(model, name, sentences[start : start + TEXTS_AT_ONCE]) for start in starts]
            embeds.append(normalize(torch.cat(parts).mean(dim=0)))  # (E,)
    return torch.stack(embeds)  # (C, E)


def _encode(model, name: str, sentences: Sequence[str]) -> torch.Tensor:
    encoded, max_length = model.encode_texts(sentences), num_positions(model.text_embeddings)
    longest = int(encoded.lengths.max())
    if longest > max_length:
        raise ValueError(
            f"A text about {name!r} has {longest} tokens, but the text tower has {max_length} positions; shorten "
            f"{max(sentences, key=len)!r}."
        )
    device = execution_device(model.text_model)
    input_ids, attention_mask = encoded.input_ids.to(device), encoded.attention_mask.to(device)
    embeds = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
    return normalize(embeds)  # (texts, E)
