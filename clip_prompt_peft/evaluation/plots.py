"""Pictures of results, drawn with matplotlib (`pip install "clip_prompt_peft[report]"`).

Every function draws into new axes, or into those that it is given, and returns them; `save_figure` writes them to a
file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .tables import printable


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart (https://jfly.uni-koeln.de/color/)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vP*X"
SEQUENTIAL = "Blues"
MAX_CLASSES_WRITTEN = 25  # more numbers than that in a matrix cannot be read


def plot_few_shot_curve(
    scores: Mapping[str, Mapping[int, Sequence[float]]], metric: str = "accuracy", axes: Axes | None = None
) -> Axes:
    """Accuracy against the number of training images per class, with the standard deviation over seeds as a band.

    Args:
        scores: method to shots to one value (0 to 1) for each seed. With 0 shots it is a horizontal line: a method
            without training.
        metric: what the vertical axis is called.
        axes: to draw into.
    """
    axes = axes or _new_axes(6.4, 4.2)
    all_shots = sorted({shots for by_shots in scores.values() for shots in by_shots if shots})
    for index, (method, by_shots) in enumerate(scores.items()):
        color = COLORS[index % len(COLORS)]
        if 0 in by_shots:
            axes.axhline(100 * np.mean(by_shots[0]), color=color, linestyle="--", label=method)
            continue
        shots = sorted(by_shots)
        means = np.array([100 * np.mean(by_shots[k]) for k in shots])
        spread = np.array([100 * np.std(by_shots[k]) for k in shots])
        marker = MARKERS[index % len(MARKERS)]
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
    """Bars side by side: a group for each method, a colour for each test set, such as base, new and H.

    Args:
        scores: method to test set to value from 0 to 1; a value may be missing.
        ylabel: of the vertical axis.
        axes: to draw into.
    """
    tests = list(dict.fromkeys(test for by_test in scores.values() for test in by_test))
    axes = axes or _new_axes(max(4.5, 0.45 * len(scores) * (len(tests) + 1)), 4.2)
    width = 0.8 / len(tests)
    for index, test in enumerate(tests):
        places = [(place, by_test[test]) for place, by_test in enumerate(scores.values()) if test in by_test]
        offset = (index - (len(tests) - 1) / 2) * width
        bars = axes.bar(
            [place + offset for place, _ in places],
            [100 * value for _, value in places],
            width,
            color=COLORS[index % len(COLORS)],
            label=test,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(scores)), scores)
    axes.set_ylabel(ylabel)
    axes.margins(y=0.12)
    axes.legend(frameon=False, ncols=len(tests), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    return axes


def plot_confusion_matrix(
    labels: Sequence[int], predicted: Sequence[int], class_names: Sequence[str], axes: Axes | None = None
) -> Axes:
    """How often images of each class (a row) were taken for each class (a column), as a share of the row.

    Args:
        labels, predicted: (N,) class indices.
        class_names: of the C classes.
        axes: to draw into.
    """
    num_classes = len(class_names)
    counts = np.zeros((num_classes, num_classes), dtype=int)
    np.add.at(counts, (np.asarray(labels), np.asarray(predicted)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes = _draw_matrix(shares, class_names, counts.astype(str), axes, vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true class")
    return axes


def plot_class_similarity(class_embeds: np.ndarray, class_names: Sequence[str], axes: Axes | None = None) -> Axes:
    """Cosine between the embeddings of any two classes: those that are alike are easily mistaken for each other.

    Args:
        class_embeds: (C, E), normalised.
        class_names: of the C classes.
        axes: to draw into.
    """
    similarity = np.asarray(class_embeds) @ np.asarray(class_embeds).T  # (C, C)
    written = np.vectorize(lambda value: f"{value:.2f}")(similarity)
    return _draw_matrix(similarity, class_names, written, axes, vmin=min(0.0, similarity.min()), vmax=1)


def plot_reliability(
    confidence: Sequence[float], is_correct: Sequence[bool], num_bins: int = 10, axes: Axes | None = None
) -> Axes:
    """Accuracy against confidence: a well calibrated model is on the diagonal, an overconfident one below it.

    Args:
        confidence: (N,) probability of the predicted class.
        is_correct: (N,)
        num_bins: equally wide.
        axes: to draw into.
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
    axes.plot(mean_confidence, accuracy, color=COLORS[0], marker="o", label="model")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return axes


def plot_image_grid(images: Sequence, titles: Sequence[str], num_columns: int = 6):
    """Images with a text above each; returns the figure.

    Args:
        images: PIL images.
        titles: of the images.
        num_columns: how many stand side by side.
    """
    plt = _pyplot()
    num_rows = max(1, -(-len(images) // num_columns))
    figure, all_axes = plt.subplots(num_rows, num_columns, figsize=(1.7 * num_columns, 2.1 * num_rows), squeeze=False)
    for axes in all_axes.flat:
        axes.set_axis_off()
    for axes, image, title in zip(all_axes.flat, images, titles):
        axes.imshow(image)
        axes.set_title("\n".join(map(_as_it_is, title.splitlines())), fontsize=8)
    return figure


def save_figure(drawn, path: str | os.PathLike | object, dpi: int = 150) -> None:
    """Writes axes or a figure to a file (or file object, as png) and closes it."""
    figure = getattr(drawn, "figure", None) or drawn
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    _pyplot().close(figure)


def _draw_matrix(values: np.ndarray, class_names, written: np.ndarray, axes, **limits) -> Axes:
    num_classes = len(class_names)
    size = max(4.0, min(12.0, 1.5 + 0.45 * num_classes))
    axes = axes or _new_axes(size, size)
    image = axes.imshow(values, cmap=SEQUENTIAL, **limits)
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    if num_classes > MAX_CLASSES_WRITTEN:
        return axes
    shown = [_as_it_is(name) for name in class_names]
    axes.set_xticks(range(num_classes), shown, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(num_classes), shown)
    middle = (limits["vmin"] + limits["vmax"]) / 2
    for (row, column), text in np.ndenumerate(written):
        color = "white" if values[row, column] > middle else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    return axes


def _as_it_is(text: str) -> str:
    return printable(text).replace("$", r"\$")  # what stands between dollars would be read as a formula


def _new_axes(width: float, height: float) -> Axes:
    return _pyplot().subplots(figsize=(width, height))[1]


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "clip_prompt_peft[report]".') from error
    from matplotlib import pyplot

    if matplotlib.get_backend().lower() not in ("agg", "inline", "module://matplotlib_inline.backend_inline"):
        pyplot.switch_backend("agg")  # draws into files, also where there is no screen
    return pyplot
