"""Writes the adapters of `tests/golden/adapters`, and what they answer, with the installed version of the package.

    python make_adapters.py TINY_CLIP OUTPUT_DIR

Only the public interface is used, so that the script runs with every version. See the README of that folder.
"""

import sys
from pathlib import Path

import torch
from adapters import as_if_trained
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPModel, CLIPTextModel

from clip_prompt_peft import PRESETS, CLIPForPromptClassification, CLIPPromptTuningConfig


CLASS_NAMES = ["cat", "fire truck", "lily of the valley", "sun"]
DEPTH_2 = {"text_prompt_depth": 2, "vision_prompt_depth": 2}

# The presets, two layers deep where the papers have nine, and the fields that no preset sets.
KINDS = {
    "default": {},
    **PRESETS,
    **{name: {**PRESETS[name], "vision_prompt_depth": 2} for name in ("vpt-deep", "promptkd")},
    **{name: {**PRESETS[name], **DEPTH_2} for name in ("ivlp", "maple", "promptsrc")},
    "middle": {"num_virtual_tokens": 4, "class_token_position": "middle"},
    "front": {"num_virtual_tokens": 4, "class_token_position": "front"},
    "multi-label": {"num_virtual_tokens": 4},
    "projection": {"num_virtual_tokens": 4, "modules_to_save": ["text_projection"]},
}
ROW_FIELDS = ("class_specific", "image_conditioned", "class_token_position")  # a plain CLIP refuses these


def main(base: str, output_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    pixel_values = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    expected = {"pixel_values": pixel_values}
    for kind, fields in KINDS.items():
        problem_type = "multi_label_classification" if kind == "multi-label" else None
        classifier = CLIPForPromptClassification.from_pretrained(
            base, class_names=CLASS_NAMES, problem_type=problem_type
        )
        model = get_peft_model(classifier, CLIPPromptTuningConfig(**fields)).eval()
        save(model, output_dir / kind)
        with torch.no_grad():
            expected[f"{kind}.logits"] = model(pixel_values=pixel_values).logits
            if not any(name in fields for name in ROW_FIELDS):
                expected[f"{kind}.plain"] = plain_logits(classifier, tokenizer, pixel_values)

    clip = CLIPModel.from_pretrained(base).eval()
    clip.add_adapter(CLIPPromptTuningConfig(num_virtual_tokens=4))
    save(clip, output_dir / "transformers")
    text_model = get_peft_model(CLIPTextModel.from_pretrained(base), CLIPPromptTuningConfig(num_virtual_tokens=4))
    save(text_model.eval(), output_dir / "text-model")
    with torch.no_grad():
        expected["transformers.plain"] = plain_logits(clip, tokenizer, pixel_values)
        expected["text-model.pooled"] = text_model(**texts(text_model, tokenizer)).pooler_output
    save_file({name: value.contiguous() for name, value in expected.items()}, output_dir / "expected.safetensors")


def save(model, folder: Path) -> None:
    """Gives the adapter tensors that are far from where they started, and saves it without a model card."""
    as_if_trained(model)
    for config in model.peft_config.values():
        config.base_model_name_or_path = "tiny_clip"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def texts(model, tokenizer):
    """The class names in the template of the model's adapter."""
    (config,) = model.peft_config.values()
    prompts = [config.padded_template.replace("{}", name) for name in CLASS_NAMES]
    return tokenizer(prompts, padding=True, return_tensors="pt")


def plain_logits(clip, tokenizer, pixel_values):
    """What a plain `CLIPModel` gives, which is told the texts."""
    return clip(**texts(clip, tokenizer), pixel_values=pixel_values).logits_per_image


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
