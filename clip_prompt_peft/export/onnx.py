"""The image tower with class embeddings baked in, as an ONNX graph.

Shapes: `B` images, `C` classes, `E` projection size.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

from ..class_encoder import normalize
from ..prompt_classification import PromptClassificationMixin


INPUT, OUTPUTS = "pixel_values", ["logits", "image_embeds"]
NEEDED_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_BYTES_IN_ONE_FILE = 1.9e9  # an ONNX file is a protocol buffer, which ends at 2 GiB
MAX_BATCH = 2**20  # without a bound, old versions of torch.export find the size not free
NUM_TRACED = 2  # a batch of 1 would be taken for a constant


def check_packages() -> None:
    """Raises `ImportError` unless the packages of the `export` extra are installed."""
    missing = [name for name in NEEDED_PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Exporting needs {', '.join(missing)}, not installed here: pip install 'clip_prompt_peft[export]'."
        )


class BakedClassifier(nn.Module):
    """The classifier for fixed classes: pixel values in, logits and normalised image embeddings out."""

    def __init__(self, classifier: PromptClassificationMixin, class_embeds: torch.Tensor):
        super().__init__()
        self.vision_model = classifier.vision_model
        self.visual_projection = getattr(classifier, "visual_projection", nn.Identity())
        self.register_buffer("class_embeds", class_embeds)  # (C, E)
        self.register_buffer("scale", classifier.logit_scale.detach().exp())
        bias = getattr(classifier, "logit_bias", torch.zeros_like(self.scale))
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        image_embeds = normalize(self.visual_projection(pooled))  # (B, E)
        return self.scale * image_embeds @ self.class_embeds.T + self.bias, image_embeds  # (B, C), (B, E)


def write_onnx(module: BakedClassifier, image_size: int, num_channels: int, file: str | os.PathLike) -> None:
    """Writes the graph, for batches of any size."""
    like = module.class_embeds
    example = torch.zeros(NUM_TRACED, num_channels, image_size, image_size, dtype=like.dtype, device=like.device)
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    torch.onnx.export(
        module.eval(),
        (example,),
        file,
        input_names=[INPUT],
        output_names=OUTPUTS,
        dynamic_shapes={INPUT: {0: torch.export.Dim("batch", max=MAX_BATCH)}},
        external_data=size > MAX_BYTES_IN_ONE_FILE,
        dynamo=True,
        optimize=True,
        verbose=False,
    )


def run_onnx(file: str | os.PathLike, batches: list[torch.Tensor]) -> np.ndarray:
    """(images of all batches, C) logits, by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(OUTPUTS[:1], {INPUT: batch.cpu().numpy()})[0] for batch in batches])
