"""What comes with the package as files: a tiny CLIP, icons to tune it on, and templates.

ATTRIBUTION.md tells where the model and the icons are from; each file of templates names its source.
"""

import json
from pathlib import Path


ASSETS = Path(__file__).resolve().parent
TINY_CLIP = str(ASSETS / "tiny_clip")


def load_templates(name: str = "imagenet") -> list[str]:
    """Templates that come with the package: `"imagenet"`, the 80 of CLIP's authors, or the 7 of `"imagenet_simple"`.

    Raises:
        ValueError: unknown name.
    """
    known = sorted(file.stem for file in (ASSETS / "templates").glob("*.json"))
    if name not in known:
        raise ValueError(f"There are no templates {name!r}; there are {', '.join(known)}.")
    return json.loads((ASSETS / "templates" / f"{name}.json").read_text(encoding="utf-8"))["templates"]
