"""Export of a tuned classifier to ONNX and safetensors files that need neither this package, peft nor PyTorch."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from transformers import BaseImageProcessor
from transformers.utils import logging as progress

from .heads import CachedImages
from .image_files import decode_image, process_images
from .installing import how_to_install
from .modeling import PromptClassificationMixin, classifier_in
from .text import normalize
from .towers import eval_mode, find_towers, image_side, is_quantized, takes_patches
from .tuner.hub import load_image_processor


logger = logging.getLogger(__name__)

ONNX_FILE, INT8_FILE, CLASS_EMBEDS_FILE = "model.onnx", "model_int8.onnx", "class_embeds.safetensors"
LABELS_FILE, CONFORMAL_FILE, REPORT_FILE = "labels.json", "conformal.json", "export.json"
INPUT, OUTPUTS = "pixel_values", ["logits", "image_embeds"]

NEEDED_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # largest difference allowed between logits, which are of the order of 100
MAX_ACCURACY_LOSS = 0.01  # of the 8-bit variant
COMPARED_BATCH_SIZE = 16
TRACED_BATCH_SIZE = 2  # a batch of 1 would be traced as a constant
MAX_BATCH_SIZE = 2**20  # old versions of torch.export need an upper bound for a dynamic dimension
MAX_BYTES_IN_ONE_FILE = 1.9e9  # an ONNX file is a protocol buffer, which is limited to 2 GiB


@dataclass(frozen=True)
class Int8Report:
    """
    The accuracy of the 8-bit variant on the given images.

    Attributes:
        accuracy, float_accuracy (`float`):
            The fraction of correct predictions of the 8-bit and of the 32-bit graph.
        agreement (`float`):
            The fraction of images for which both graphs predict the same class.
        is_kept (`bool`):
            Whether the accuracy drops by at most one percentage point. Otherwise the file is not written.
    """

    accuracy: float
    float_accuracy: float
    agreement: float
    is_kept: bool


@dataclass(frozen=True)
class ExportReport:
    """
    The exported files and how their predictions compare with those of the model.

    Attributes:
        files (`dict[str, int]`):
            The size of each file in bytes.
        num_images (`int`):
            The number of given images on which graph and model were compared. 0 means random pixels.
        max_difference (`float`):
            The largest absolute difference between the logits of onnxruntime and of PyTorch.
        int8 (`Int8Report`, *optional*):
            The accuracy of the 8-bit variant, if requested.
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
    image_processor: BaseImageProcessor | None = None,
    int8: bool = False,
) -> ExportReport:
    """
    Exports the image tower together with the class embeddings of the active adapter.

    The following files are written:

    - `model.onnx` maps `pixel_values` (B, 3, H, W) to `logits` (B, C) and `image_embeds` (B, E), for any batch size B.
    - `model_int8.onnx` is the same graph with 8-bit weights, if requested and accurate enough.
    - `class_embeds.safetensors` holds the normalized `class_embeds` (C, E), `scale` and `bias`. For an image embedding
      x of the same image tower, the logits are `scale * x / |x| @ class_embeds.T + bias`. A temperature of the
      classifier is part of `scale` and `bias`. A head with a cache adds
      `cache_alpha * exp(-cache_beta * (1 - x / |x| @ cache_keys.T)) @ cache_values` to them.
    - `labels.json` holds the class names in order, and `preprocessor_config.json` the image preprocessing.
    - `conformal.json`, if the model has scores for sets of classes, holds what
      [`~evaluation.conformal.ConformalClassifier`] needs: the method, the number of validation images, their scores.
    - `export.json` holds the returned report.

    Adapters that are conditioned on the image cannot be exported, since their class embeddings differ from image to
    image. The classes of an exported model cannot be changed.

    Args:
        model (`PromptClassificationMixin` or `PeftModel`):
            A classifier in float32, with or without adapters.
        path (`str` or `os.PathLike`):
            The folder to write to.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            Some dozens or hundreds of real images on which to compare the graph with the model. By default, random
            pixels are used.
        labels (`Sequence[int]`, *optional*):
            The class indices of the images, needed for `int8`.
        image_processor (`BaseImageProcessor`, *optional*):
            The image processor of the model. By default, it is loaded from where the base model was loaded.
        int8 (`bool`, *optional*, defaults to `False`):
            Whether to also write a graph with 8-bit weights. It is kept only if the accuracy on `images` drops by at
            most one percentage point.

    Returns:
        `ExportReport`: The files and how they compare with the model.

    Raises:
        ImportError: If packages of the `export` extra are missing.
        TypeError: If the model is not a classifier.
        ValueError: If the model cannot be exported, if it has no class names or no image processor, or if images and
            labels do not match.
        RuntimeError: If the logits of the graph differ from those of the model. In this case nothing is written.

    Example:

    ```py
    >>> report = export_classifier(model, "pets-onnx", images=test["image"], labels=test["label"], int8=True)
    ```
    """
    classifier = classifier_in(model, "export_classifier")
    _check_exportable(classifier)
    _check_images(classifier, images, labels, int8)
    _check_packages()
    image_processor = image_processor or load_image_processor(classifier)
    with eval_mode(classifier):
        baked = BakedClassifier(
            classifier, classifier.get_class_embeds(), classifier.class_head.baked(classifier.class_names)
        )
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path) as folder:  # an earlier export stays in place until this one succeeds
            report = _write_files(Path(folder), classifier, baked, images, labels, image_processor, int8)
            for file in [*path.glob(f"{ONNX_FILE}*"), *path.glob(f"{INT8_FILE}*"), *path.glob(CONFORMAL_FILE)]:
                file.unlink()  # those of an earlier export must not remain beside the new ones
            for file in Path(folder).iterdir():
                os.replace(file, path / file.name)
    return report


def _check_exportable(classifier: PromptClassificationMixin) -> None:
    if getattr(classifier.prompt_layout, "image_conditioned", False):
        raise ValueError(
            "The active adapter is conditioned on the image: its class embeddings differ from image to image, so they "
            "cannot be exported. Serve the model with PyTorch, or export another adapter."
        )
    if any(takes_patches(classifier.get_submodule(t.embeddings_key)) for t in find_towers(classifier, "vision")):
        raise ValueError(
            f"{type(classifier).__name__} takes images of any shape as patches, which cannot be exported. Embed "
            "them with PyTorch (get_image_features) and compare them with get_class_embeds()."
        )
    quantized = [m for part in image_side(classifier) for m in part.modules() if is_quantized(m)]
    if quantized:
        weight = type(getattr(quantized[0], "weight", None)).__name__
        raise ValueError(
            f"The image tower is quantized (it holds a {type(quantized[0]).__name__} with a weight of type {weight}), "
            "which cannot be exported; load the base model in float32 and the adapter with it. int8=True writes a "
            "graph with 8-bit weights."
        )
    if classifier.dtype != torch.float32:
        raise ValueError(f"The model is in {classifier.dtype}; load it in float32 (dtype=torch.float32) to export it.")


def _check_images(classifier: PromptClassificationMixin, images, labels, int8: bool) -> None:
    if int8 and (images is None or labels is None):
        raise ValueError("int8=True needs images and labels to compare the accuracy.")
    if images is not None and not len(images):
        raise ValueError("images is empty; leave it out to compare on random pixels.")
    if labels is None:
        return
    num_images, num_classes = 0 if images is None else len(images), len(classifier.class_names or [])
    if len(labels) != num_images:
        raise ValueError(f"Expected one label per image, got {len(labels)} labels for {num_images} images.")
    bad = [label for label in labels if not 0 <= label < num_classes]
    if bad:
        raise ValueError(f"Label {bad[0]} is out of range: the model has {num_classes} classes.")


def _check_packages() -> None:
    missing = [name for name in NEEDED_PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f"Exporting needs {', '.join(missing)}, not installed; {how_to_install('export')}.")


def _write_files(
    folder: Path, classifier: PromptClassificationMixin, baked: BakedClassifier, images, labels, image_processor, int8
) -> ExportReport:
    class_names = json.dumps(classifier.class_names)
    tensors = {name: tensor.contiguous() for name, tensor in baked.buffers_of_head().items()}
    save_file(tensors, folder / CLASS_EMBEDS_FILE, metadata={"format": "pt", "class_names": class_names})
    (folder / LABELS_FILE).write_text(class_names + "\n")
    image_processor.save_pretrained(folder)
    if (scores := _valid_scores(classifier)) is not None:
        (folder / CONFORMAL_FILE).write_text(json.dumps(scores) + "\n")
    write_onnx(baked, classifier.config.vision_config, folder / ONNX_FILE)

    batches = _pixel_batches(classifier, images, image_processor)
    logits = run_onnx(folder / ONNX_FILE, batches)  # (N, C)
    shown = progress.tqdm(batches, desc="Comparing with the model", leave=False, delay=2)
    expected = torch.cat([classifier(pixel_values=batch.to(classifier.device)).logits for batch in shown])  # (N, C)
    difference = float(np.abs(logits - expected.cpu().numpy()).max())
    if not difference <= TOLERANCE:  # also true for NaN
        raise RuntimeError(
            f"The exported graph gives other logits than the model: they differ by up to {difference:.2g}, but only "
            f"{TOLERANCE} is allowed. Please report this with the versions of torch, onnx and onnxruntime."
        )
    int8_report = None
    if int8:
        int8_report = write_int8(folder / ONNX_FILE, folder / INT8_FILE, batches, np.asarray(labels), logits)
    report = ExportReport(
        files={file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        num_images=0 if images is None else len(images),
        max_difference=difference,
        int8=int8_report,
    )
    (folder / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n")
    return report


def _valid_scores(classifier: PromptClassificationMixin) -> dict | None:
    """Returns what is written of the scores for sets of classes; `None` if there are none for this model."""
    from .evaluation.conformal import ConformalClassifier  # which imports `datasets`

    if classifier.conformal_scores is None:
        return None
    try:
        scores = ConformalClassifier(classifier).scores.to_dict()
    except ValueError as error:
        logger.warning("The scores for sets of classes are not exported: %s", error)
        return None
    return {name: scores[name] for name in ("method", "randomized", "num_images", "scores")}


def _pixel_batches(classifier: PromptClassificationMixin, images, image_processor) -> list[torch.Tensor]:
    """Returns batches of pixel values (B, 3, H, W) of different sizes. The first holds a single image."""
    if images is None:
        vision = classifier.config.vision_config
        shape = (COMPARED_BATCH_SIZE, vision.num_channels, vision.image_size, vision.image_size)
        pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return list(pixel_values.split([1, COMPARED_BATCH_SIZE - 1]))
    starts = range(1, len(images), COMPARED_BATCH_SIZE)
    batches = [images[:1], *(images[start : start + COMPARED_BATCH_SIZE] for start in starts)]
    return [
        process_images(image_processor, [decode_image(image) for image in batch])["pixel_values"] for batch in batches
    ]


class BakedClassifier(nn.Module):
    """A classifier with fixed class embeddings (C, E), which maps pixel values to logits and image embeddings."""

    def __init__(
        self, classifier: PromptClassificationMixin, class_embeds: torch.Tensor, class_head: nn.Module | None = None
    ) -> None:
        super().__init__()
        temperature = classifier.temperature or 1.0  # of all logits, those of a cache included
        if isinstance(class_head, CachedImages):
            alpha, beta = class_head.alpha / temperature, class_head.beta
            class_head = CachedImages(class_head.keys.detach(), class_head.values, alpha, beta)
        self.class_head = class_head
        self.vision_model = classifier.vision_model
        self.visual_projection = getattr(classifier, "visual_projection", nn.Identity())
        self.image_head = classifier.image_head
        self.register_buffer("class_embeds", class_embeds)
        self.register_buffer("scale", classifier.log_scale.detach().exp() / temperature)
        bias = getattr(classifier, "logit_bias", torch.zeros_like(self.scale))
        self.register_buffer("bias", bias.detach() / temperature)

    def buffers_of_head(self) -> dict[str, torch.Tensor]:
        """Returns what the logits are computed of, by name, beside the image embeddings."""
        tensors = dict(self.named_buffers(recurse=False))
        if isinstance(self.class_head, CachedImages):
            numbers = {name: torch.tensor(float(getattr(self.class_head, name))) for name in ("alpha", "beta")}
            cache = {**dict(self.class_head.named_buffers()), **numbers}
            tensors |= {f"cache_{name}": tensor for name, tensor in cache.items()}
        return tensors

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        image_embeds = normalize(self.image_head(self.visual_projection(pooled)))  # (B, E)
        logits = self.scale * image_embeds @ self.class_embeds.T + self.bias  # (B, C)
        if isinstance(self.class_head, CachedImages):
            logits = self.class_head(image_embeds, logits)
        return logits, image_embeds


def write_onnx(baked: BakedClassifier, vision_config, file: Path) -> None:
    """Writes the graph of a baked classifier, for batches of any size."""
    shape = (TRACED_BATCH_SIZE, vision_config.num_channels, vision_config.image_size, vision_config.image_size)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in baked.state_dict().values())
    with _without_warnings_of_exporter():
        torch.onnx.export(
            baked.eval(),
            (baked.class_embeds.new_zeros(shape),),
            file,
            input_names=[INPUT],
            output_names=OUTPUTS,
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch", max=MAX_BATCH_SIZE)}},
            external_data=num_bytes > MAX_BYTES_IN_ONE_FILE,
            dynamo=True,
            optimize=True,
            verbose=False,
        )


@contextmanager
def _without_warnings_of_exporter() -> Iterator[None]:
    """Hides that torchvision's operators are missing, which none of the models has, and a deprecation within torch."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec", category=FutureWarning)
            yield
    finally:
        exporter.setLevel(level)


def run_onnx(file: Path, batches: list[torch.Tensor]) -> np.ndarray:
    """Runs a graph with onnxruntime on the CPU and returns the logits of all N images, (N, C)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    shown = progress.tqdm(batches, desc=f"Running {file.name}", leave=False, delay=2)
    return np.concatenate([session.run(OUTPUTS[:1], {INPUT: batch.cpu().numpy()})[0] for batch in shown])


def write_int8(
    float_file: Path, file: Path, batches: list[torch.Tensor], labels: np.ndarray, float_logits: np.ndarray
) -> Int8Report:
    """Quantizes the weights of a graph dynamically, and removes the file again if the accuracy drops too much."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(float_file)
    del graph.graph.value_info[:]  # intermediate shapes, which older versions of quantize_dynamic do not update
    quantize_dynamic(
        graph,
        file,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],  # not every runtime supports convolutions of signed 8-bit integers
        use_external_data_format=Path(f"{float_file}.data").exists(),
    )
    predictions, float_predictions = run_onnx(file, batches).argmax(axis=1), float_logits.argmax(axis=1)  # (N,)
    accuracy, float_accuracy = float((predictions == labels).mean()), float((float_predictions == labels).mean())
    report = Int8Report(
        accuracy=accuracy,
        float_accuracy=float_accuracy,
        agreement=float((predictions == float_predictions).mean()),
        is_kept=accuracy >= float_accuracy - MAX_ACCURACY_LOSS,
    )
    if not report.is_kept:
        for part in file.parent.glob(f"{file.name}*"):
            part.unlink()
        logger.warning("The 8-bit graph is not kept: its accuracy is %.4f instead of %.4f.", accuracy, float_accuracy)
    return report
