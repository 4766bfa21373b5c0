"""From a tuned classifier to files that run without this library, without peft and without PyTorch."""

from .classifier import CLASS_EMBEDS_FILE, ONNX_FILE, ExportReport, export_classifier
from .int8 import INT8_FILE


__all__ = ["CLASS_EMBEDS_FILE", "INT8_FILE", "ONNX_FILE", "ExportReport", "export_classifier"]
