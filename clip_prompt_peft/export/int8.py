"""A variant of the graph with 8-bit weights, by onnxruntime's own tool."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .onnx import run_onnx


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
