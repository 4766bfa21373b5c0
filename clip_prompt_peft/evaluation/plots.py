"""Plots of results with matplotlib, which comes with the extra `report`.

Each function draws into the axes it is given, or into new ones, and returns them. `save_figure` writes them to a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..installing import how_to_install
from .tables import printable


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# the palette of Okabe and Ito, which color-blind readers can distinguish (https://jfly.uni-koeln.de/color/)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vP*X"
MAX_CLASSES_WRITTEN = 25  # the numbers in a larger matrix are unreadable


def plot_few_shot_curve(
    scores: Mapping[str, Mapping[int, Sequence[float]]], metric: str = "accuracy", axes: Axes | None = None
) -> Axes:
    """Plots a metric against the number of training images per class, with a band of one standard deviation.

    Args:
        scores (`Mapping[str, Mapping[int, Sequence[float]]]`):
            For each method and number of shots, one value from 0 to 1 per seed. A method with 0 shots needs no
            training and is drawn as a horizontal line.
        metric (`str`, *optional*, defaults to `"accuracy"`):
            The label of the vertical axis.
        axes (`Axes`, *optional*):
            The axes to draw into.
    """
    axes = axes or _new_axes(6.4, 4.2)
    all_shots = sorted({shots for by_shots in scores.values() for shots in by_shots if shots})
    for index, (method, by_shots) in enumerate(scores.items()):
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        if 0 in by_shots:
            axes.axhline(100 * np.mean(by_shots[0]), color=color, linestyle="--", label=method)
            continue
        shots = sorted(by_shots)
        means = np.array([100 * np.mean(by_shots[k]) for k in shots])
        spread = np.array([100 * np.std(by_shots[k]) for k in shots])
        axes.plot(shots, means, color=color, marker=marker, markersize=5, label=method)
        axes.fill_between(shots, means - spread, means + spread, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(all_shots, [str(shots) for shots in all_shots])
    axes.set_xlabel("training images per class")
    axes.set_ylabel(f"{metric}, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return axes


def plot_bars(
    scores: Mapping[str, Mapping[str, float]], ylabel: str = "accuracy, %", axes: Axes | None = None
) -> Axes:
    """Plots one group of bars for each method, with one color for each test set, such as base, new and H.

    Args:
        scores (`Mapping[str, Mapping[str, float]]`):
            For each method and test set, a value from 0 to 1. Missing values have no bar.
        ylabel (`str`, *optional*, defaults to `"accuracy, %"`):
            The label of the vertical axis.
        axes (`Axes`, *optional*):
            The axes to draw into.
    """
    tests = list(dict.fromkeys(test for by_test in scores.values() for test in by_test))
    axes = axes or _new_axes(max(4.5, 0.45 * len(scores) * (len(tests) + 1)), 4.2)
    width = 0.8 / len(tests)
    for index, test in enumerate(tests):
        offset = (index - (len(tests) - 1) / 2) * width
        heights = {place + offset: by_test[test] for place, by_test in enumerate(scores.values()) if test in by_test}
        values = [100 * value for value in heights.values()]
        bars = axes.bar(list(heights), values, width, color=COLORS[index % len(COLORS)], label=test)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(scores)), scores)
    axes.set_ylabel(ylabel)
    axes.margins(y=0.12)
    axes.legend(frameon=False, ncols=len(tests), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    return axes


def plot_confusion_matrix(
    labels: Sequence[int] | np.ndarray,
    predicted: Sequence[int] | np.ndarray,
    class_names: Sequence[str],
    axes: Axes | None = None,
) -> Axes:
    """Plots a confusion matrix: true classes in rows, predicted classes in columns, shaded by the share of the row.

    Args:
        labels, predicted (`Sequence[int]` or `np.ndarray`):
            The (N,) indices of the true and the predicted classes.
        class_names (`Sequence[str]`):
            The names of the C classes.
        axes (`Axes`, *optional*):
            The axes to draw into.
    """
    counts = np.zeros((len(class_names), len(class_names)), dtype=int)  # (C, C)
    np.add.at(counts, (np.asarray(labels), np.asarray(predicted)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes = _draw_matrix(shares, counts.astype(str), class_names, axes, vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true class")
    return axes


def plot_class_similarity(class_embeds: np.ndarray, class_names: Sequence[str], axes: Axes | None = None) -> Axes:
    """Plots the cosine similarity between the class embeddings. Similar classes are easily confused.

    Args:
        class_embeds (`np.ndarray`):
            The (C, E) normalized class embeddings.
        class_names (`Sequence[str]`):
            The names of the C classes.
        axes (`Axes`, *optional*):
            The axes to draw into.
    """
    similarity = np.asarray(class_embeds) @ np.asarray(class_embeds).T  # (C, C)
    cells = np.char.mod("%.2f", similarity)
    return _draw_matrix(similarity, cells, class_names, axes, vmin=min(0.0, similarity.min()), vmax=1)


def plot_reliability(
    confidence: Sequence[float] | np.ndarray,
    is_correct: Sequence[bool] | np.ndarray,
    num_bins: int = 10,
    axes: Axes | None = None,
) -> Axes:
    """Plots accuracy against confidence. The curve of an overconfident model lies below the diagonal.

    Args:
        confidence (`Sequence[float]` or `np.ndarray`):
            The (N,) probabilities of the predicted classes.
        is_correct (`Sequence[bool]` or `np.ndarray`):
            Whether each of the N predictions is correct.
        num_bins (`int`, *optional*, defaults to 10):
            The number of bins of equal width.
        axes (`Axes`, *optional*):
            The axes to draw into.
    """
    confidence, is_correct = np.asarray(confidence), np.asarray(is_correct, dtype=float)
    axes = axes or _new_axes(4.2, 4.2)
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    is_used = counts > 0
    accuracy = np.bincount(bins, is_correct, num_bins)[is_used] / counts[is_used]
    mean_confidence = np.bincount(bins, confidence, num_bins)[is_used] / counts[is_used]
    edges = np.arange(num_bins) / num_bins
    axes.bar(edges, counts / counts.sum(), 1 / num_bins, align="edge", color="#BBBBBB", label="share of images")
    axes.plot([0, 1], [0, 1], color="#666666", linestyle="--", linewidth=1, label="confidence = accuracy")
    # Markers at 0 and 1 are drawn whole, over the frame.
    axes.plot(mean_confidence, accuracy, color=COLORS[0], marker="o", label="model", clip_on=False, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return axes


def plot_image_grid(images: Sequence, titles: Sequence[str], num_columns: int = 6) -> Figure:
    """Plots images in a grid and returns the figure.

    Args:
        images (`Sequence[PIL.Image.Image]`):
            The images.
        titles (`Sequence[str]`):
            The text above each image.
        num_columns (`int`, *optional*, defaults to 6):
            The number of images per row.
    """
    num_rows = max(1, -(-len(images) // num_columns))
    size = (1.7 * num_columns, 2.1 * num_rows)
    figure, all_axes = _pyplot().subplots(num_rows, num_columns, figsize=size, squeeze=False)
    for axes in all_axes.flat:
        axes.set_axis_off()
    for axes, image, title in zip(all_axes.flat, images, titles):
        axes.imshow(image)
        axes.set_title("\n".join(map(_literal, title.splitlines())), fontsize=8)
    return figure


def save_figure(drawn, path: str | os.PathLike | object, dpi: int = 150) -> None:
    """Saves axes or a figure and closes the figure.

    Args:
        drawn (`Axes` or `Figure`):
            The axes or figure.
        path (`str`, `os.PathLike` or file object):
            The file to write. A file object receives a PNG.
        dpi (`int`, *optional*, defaults to 150):
            The resolution in dots per inch.
    """
    figure = getattr(drawn, "figure", None) or drawn
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    _pyplot().close(figure)


def _draw_matrix(values: np.ndarray, cells: np.ndarray, class_names, axes, vmin: float, vmax: float) -> Axes:
    """Draws a matrix from the (C, C) values that shade its cells and the (C, C) texts in them."""
    num_classes = len(class_names)
    size = max(4.0, min(12.0, 1.5 + 0.45 * num_classes))
    axes = axes or _new_axes(size, size)
    image = axes.imshow(values, cmap="Blues", vmin=vmin, vmax=vmax)
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    if num_classes > MAX_CLASSES_WRITTEN:
        return axes
    shown = [_literal(name) for name in class_names]
    axes.set_xticks(range(num_classes), shown, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(num_classes), shown)
    for (row, column), text in np.ndenumerate(cells):
        color = "white" if values[row, column] > (vmin + vmax) / 2 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    return axes


def _literal(text: str) -> str:
    return printable(text).replace("$", r"\$")  # matplotlib parses text between dollar signs as a formula


def _new_axes(width: float, height: float) -> Axes:
    return _pyplot().subplots(figsize=(width, height))[1]


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"Plots need matplotlib; {how_to_install('report')}.") from error
    from matplotlib import pyplot

    if matplotlib.get_backend().lower() not in ("agg", "inline", "module://matplotlib_inline.backend_inline"):
        pyplot.switch_backend("agg")  # draws into files, which works without a display
    return pyplot
