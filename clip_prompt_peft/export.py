"""From a tuned classifier to files that run without this library, without peft and without PyTorch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoImageProcessor

from .modeling import PromptClassificationMixin
from .text import normalize
from .towers import find_towers, takes_patches


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


INT8_FILE = "model_int8.onnx"


MAX_LOSS = 0.01  # of accuracy


@dataclass(frozen=True)
class Int8Report:
    """
    How the 8-bit variant compares on the images that were given.

    Attributes:
        accuracy, float_accuracy: shares of correct predictions, 8-bit and 32-bit.
        agreement: share of images with the same prediction.
        is_kept: whether accuracy was kept, to within a point; the file is there only then.
    """

    accuracy: float
    float_accuracy: float
    agreement: float
    is_kept: bool


def write_int8(
    float_file: Path, file: Path, batches: list[torch.Tensor], labels: np.ndarray, float_logits: np.ndarray
) -> Int8Report:
    """Quantises the weights dynamically, compares, and removes the file again if accuracy was lost."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(float_file)
    del graph.graph.value_info[:]  # shapes in between, which older versions of the tool do not bring up to date
    quantize_dynamic(
        graph,
        file,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],  # not every runtime has convolutions of signed bytes
        use_external_data_format=Path(f"{float_file}.data").exists(),
    )
    predictions = run_onnx(file, batches).argmax(axis=1)
    float_predictions = float_logits.argmax(axis=1)
    accuracy, float_accuracy = (float((p == labels).mean()) for p in (predictions, float_predictions))
    report = Int8Report(
        accuracy=accuracy,
        float_accuracy=float_accuracy,
        agreement=float((predictions == float_predictions).mean()),
        is_kept=accuracy >= float_accuracy - MAX_LOSS,
    )
    if not report.is_kept:
        for part in file.parent.glob(f"{file.name}*"):
            os.remove(part)
    return report


logger = logging.getLogger(__name__)


ONNX_FILE, CLASS_EMBEDS_FILE = "model.onnx", "class_embeds.safetensors"


LABELS_FILE, REPORT_FILE = "labels.json", "export.json"


TOLERANCE = 1e-3  # of logits, which go up to 100; what is found is reported


BATCH_SIZE = 16


@dataclass(frozen=True)
class ExportReport:
    """
    What was written, and how it compares with the model.

    Attributes:
        files: sizes in bytes by file name.
        num_images: on how many of your images the graph was compared with the model; 0 means on random pixels.
        max_difference: largest difference between a logit of onnxruntime and of PyTorch.
        int8: the 8-bit variant, if one was asked for.
    """

    files: dict[str, int]
    num_images: int
    max_difference: float
    int8: Int8Report | None = None


@torch.no_grad()
def export_classifier(
    model: PromptClassificationMixin | PeftModel,
    path: str | os.PathLike,
    images: Sequence[Image.Image] | None = None,
    labels: Sequence[int] | None = None,
    image_processor=None,
    int8: bool = False,
) -> ExportReport:
    """Writes the image tower with the class embeddings of the active adapter baked in.

    The folder then holds

    - `model.onnx`: `pixel_values` (B, 3, H, W) to `logits` (B, C) and `image_embeds` (B, E), for any B;
    - `model_int8.onnx`, if asked for and as accurate: the same with 8-bit weights;
    - `class_embeds.safetensors`: `class_embeds` (C, E), normalised, `scale` and `bias`: with an image embedding x of
      the same image tower, logits are `scale * x / |x| @ class_embeds.T + bias`;
    - `labels.json`, the class names in order, and `preprocessor_config.json`;
    - `export.json`: the figures of the returned report.

    Every kind of adapter can be exported but those conditioned on the image, whose class embeddings differ from image
    to image. Classes can no longer be exchanged afterwards.

    Args:
        model: a classifier with or without adapters, in float32.
        path: folder to write into.
        images: real images, some dozens or hundreds, on which to compare the graph with the model. Without them
            random pixels are taken.
        labels: their class indices, for `int8`.
        image_processor: by default the one that lies beside the base model.
        int8: also quantise the weights. Kept only if accuracy on `images` drops by a point at most.

    Returns:
        What was written and how it compares.

    Raises:
        ImportError: packages of the `export` extra are missing.
        TypeError: a model that is no classifier.
        ValueError: a conditioned adapter; a model in half precision; images and labels that do not go together; no
            class names, or no image processor.
        RuntimeError: the graph does not give the model's logits. Nothing is written then.

    Example:

    ```py
    >>> report = export_classifier(model, "pets-onnx", images=test["image"], labels=test["label"], int8=True)
    ```
    """
    classifier = _classifier_in(model)
    _check_exportable(classifier)
    _check_images(classifier, images, labels, int8)
    check_packages()
    image_processor = image_processor or _processor_of(classifier)
    was_training = classifier.training
    classifier.eval()
    try:
        module = BakedClassifier(classifier, classifier.get_class_embeds())
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path) as folder:  # files of an earlier export stay until all is well
            report = _write(classifier, module, Path(folder), images, labels, image_processor, int8)
            _remove_graphs(path)
            for file in Path(folder).iterdir():
                os.replace(file, path / file.name)
    finally:
        classifier.train(was_training)
    return report


def _classifier_in(model) -> PromptClassificationMixin:
    classifier = model
    while isinstance(classifier, PeftModel):
        classifier = classifier.get_base_model()
    if not isinstance(classifier, PromptClassificationMixin):
        raise TypeError(
            "export_classifier takes a classifier such as CLIPForPromptClassification, or a PeftModel around one, got "
            f"a {type(classifier).__name__}; make a classifier of it with AutoModelForPromptClassification.from_base."
        )
    return classifier


def _check_exportable(classifier: PromptClassificationMixin) -> None:
    if getattr(classifier.prompt_layout, "image_conditioned", False):
        raise ValueError(
            "The active adapter is conditioned on the image: its class embeddings differ from image to image, so none "
            "can be baked in. Serve it with PyTorch, or export an adapter of another kind."
        )
    if any(takes_patches(classifier.get_submodule(t.embeddings_key)) for t in find_towers(classifier, "vision")):
        raise ValueError(
            f"{type(classifier).__name__} takes images of any shape, as patches with a mask, for which there is no "
            "graph yet; embed images with PyTorch (get_image_features) and compare them with get_class_embeds(), or "
            "export a model of fixed image size."
        )
    if classifier.dtype != torch.float32:
        raise ValueError(
            f"The model is in {classifier.dtype}; load it in float32 (dtype=torch.float32) to export it. Smaller "
            "files come from int8=True."
        )


def _check_images(classifier, images, labels, int8: bool) -> None:
    if int8 and (images is None or labels is None):
        raise ValueError("int8=True needs images and labels, to see whether accuracy is kept.")
    if images is not None and not len(images):
        raise ValueError("images is empty; leave it out to compare on random pixels.")
    if labels is None:
        return
    num_images, num_classes = 0 if images is None else len(images), len(classifier.class_names or [])
    if len(labels) != num_images:
        raise ValueError(f"There must be one label for each image, got {len(labels)} labels for {num_images} images.")
    bad = [label for label in labels if not 0 <= label < num_classes]
    if bad:
        raise ValueError(
            f"Label {bad[0]} is out of range: the model has {num_classes} classes, 0 to {num_classes - 1}."
        )


def _processor_of(classifier):
    if not classifier.name_or_path:
        raise ValueError(
            "The preprocessing is written beside the graph, and this model has no name_or_path to load an image "
            "processor from; pass image_processor=..."
        )
    return AutoImageProcessor.from_pretrained(classifier.name_or_path, trust_remote_code=False)


def _remove_graphs(path: Path) -> None:
    # an 8-bit graph of an earlier export must not stand beside the new one
    for name in (ONNX_FILE, INT8_FILE):
        for file in path.glob(f"{name}*"):
            file.unlink()


def _write(classifier, module: BakedClassifier, folder: Path, images, labels, image_processor, int8) -> ExportReport:
    _write_sidecars(classifier.class_names, module, folder, image_processor)
    vision = classifier.config.vision_config
    write_onnx(module, vision.image_size, vision.num_channels, folder / ONNX_FILE)

    batches = _pixel_batches(classifier, images, image_processor)
    logits = run_onnx(folder / ONNX_FILE, batches)
    expected = torch.cat([classifier(pixel_values=batch.to(classifier.device)).logits for batch in batches])
    difference = float(np.abs(logits - expected.cpu().numpy()).max())
    if not difference <= TOLERANCE:  # NaN included
        raise RuntimeError(
            f"The exported graph gives other logits than the model: they differ by up to {difference:.2g}, where "
            f"{TOLERANCE} is allowed. Please report this together with the versions of torch, onnx and onnxruntime."
        )
    int8_report = None
    if int8:
        int8_report = write_int8(folder / ONNX_FILE, folder / INT8_FILE, batches, np.asarray(labels), logits)
        _say_if_dropped(int8_report)
    report = ExportReport(
        files={file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        num_images=0 if images is None else len(images),
        max_difference=difference,
        int8=int8_report,
    )
    (folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


def _write_sidecars(class_names: list[str], module: BakedClassifier, folder: Path, image_processor) -> None:
    names = json.dumps(class_names)
    tensors = {"class_embeds": module.class_embeds.contiguous(), "scale": module.scale, "bias": module.bias}
    save_file(tensors, folder / CLASS_EMBEDS_FILE, metadata={"format": "pt", "class_names": names})
    (folder / LABELS_FILE).write_text(names + "\n")
    image_processor.save_pretrained(folder)


def _pixel_batches(classifier, images, image_processor) -> list[torch.Tensor]:
    """Batches of different sizes, one of them of a single image."""
    if images is None:
        vision = classifier.config.vision_config
        shape = (BATCH_SIZE, vision.num_channels, vision.image_size, vision.image_size)
        pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return list(pixel_values.split([1, BATCH_SIZE - 1]))
    starts = [0, *range(1, len(images), BATCH_SIZE)]
    batches = [images[start:end] for start, end in zip(starts, [*starts[1:], len(images)])]
    return [
        image_processor([image.convert("RGB") for image in batch], return_tensors="pt")["pixel_values"]
        for batch in batches
    ]


def _say_if_dropped(report: Int8Report) -> None:
    if not report.is_kept:
        logger.warning(
            "The 8-bit variant was not kept: its accuracy is %.2f %%, that of the 32-bit graph %.2f %%.",
            100 * report.accuracy,
            100 * report.float_accuracy,
        )
