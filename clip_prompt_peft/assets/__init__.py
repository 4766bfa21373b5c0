"""The files that come with the package: a tiny CLIP, icons to train it on, templates, byte pairs, and a pipeline.

ATTRIBUTION.md states the origin of the model, the icons and the byte pairs; each file of templates names its source.
"""

import json
from pathlib import Path


ASSETS = Path(__file__).resolve().parent
TINY_CLIP = str(ASSETS / "tiny_clip")
CLIP_MERGES = ASSETS / "clip_bpe" / "merges.txt.gz"  # the byte pairs of CLIP's tokenizer, in the order of their merges
PIPELINE_FILE = ASSETS / "prompt_classification_pipeline.py"  # is copied beside saved classifiers


def load_templates(name: str = "imagenet") -> list[str]:
    """
    Loads prompt templates that come with the package.

    Args:
        name (`str`, *optional*, defaults to `"imagenet"`):
            `"imagenet"` for the 80 templates of CLIP's authors, `"imagenet_simple"` for the 7 that do nearly as well.

    Raises:
        ValueError: If the name is unknown.
    """
    known = sorted(file.stem for file in (ASSETS / "templates").glob("*.json"))
    if name not in known:
        raise ValueError(f"There are no templates {name!r}; there are {', '.join(known)}.")
    return json.loads((ASSETS / "templates" / f"{name}.json").read_text(encoding="utf-8"))["templates"]


def custom_pipelines() -> dict[str, dict]:
    """Returns what the config of a saved classifier says about the pipeline in [`PIPELINE_FILE`] beside it."""
    impl = f"{PIPELINE_FILE.stem}.PromptClassificationPipeline"
    return {"image-classification": {"impl": impl, "pt": ["AutoModel"]}}
