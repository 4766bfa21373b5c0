"""Plots, checked by the artists on their axes."""

import sys

import numpy as np
import pytest
from PIL import Image

from clip_prompt_peft.evaluation import plots


@pytest.fixture(autouse=True)
def close_all():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_few_shot_curve_shows_means_and_untrained_methods_as_level_lines():
    scores = {"zero-shot": {0: [0.4]}, "prompts": {1: [0.5, 0.7], 16: [0.8, 0.8]}}
    axes = plots.plot_few_shot_curve(scores, "accuracy")
    level, curve = axes.get_lines()
    assert list(level.get_ydata()) == pytest.approx([40, 40])
    np.testing.assert_allclose(curve.get_xydata(), [[1, 60], [16, 80]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["zero-shot", "prompts"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "16"]


def test_a_missing_bar_is_left_out():
    axes = plots.plot_bars({"probe": {"base": 0.9}, "prompts": {"base": 0.8, "new": 0.7}})
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [pytest.approx([90, 80]), pytest.approx([70])]
    assert axes.containers[1][0].get_x() > axes.containers[0][1].get_x()  # the only new bar is that of the prompts


def test_a_confusion_matrix_has_true_classes_as_rows():
    axes = plots.plot_confusion_matrix([0, 0, 1, 1, 1], [0, 1, 1, 1, 1], ["cat", "dog"])
    assert texts(axes) == ["1", "1", "0", "3"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.5, 0.5], [0, 1]])
    assert axes.get_ylabel() == "true class"


def test_numbers_are_left_out_of_a_matrix_that_is_too_large_to_read():
    names = [str(index) for index in range(40)]
    axes = plots.plot_class_similarity(np.eye(40), names)
    assert not texts(axes) and axes.images[0].get_array().shape == (40, 40)


def test_reliability_is_accuracy_by_bin_of_confidence():
    axes = plots.plot_reliability([0.91, 0.99, 0.55, 0.51, 1.0], [True, False, False, True, True], num_bins=10)
    diagonal, model = axes.get_lines()
    np.testing.assert_allclose(model.get_xydata(), [[0.53, 0.5], [(0.91 + 0.99 + 1) / 3, 2 / 3]])
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches][5], 2 / 5)


def test_similar_classes_are_told_by_their_cosine():
    axes = plots.plot_class_similarity(np.array([[1, 0], [0.6, 0.8]]), ["a", "b"])
    assert texts(axes) == ["1.00", "0.60", "0.60", "1.00"]


def test_figures_are_saved(tmp_path):
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    plots.save_figure(plots.plot_image_grid(images, ["a", "b"], num_columns=1), tmp_path / "grid.png")
    plots.save_figure(plots.plot_bars({"a": {"b": 1}}), tmp_path / "bars.svg")
    width, height = Image.open(tmp_path / "grid.png").size
    assert height > width > 50
    assert "<svg" in (tmp_path / "bars.svg").read_text()


def test_without_matplotlib_it_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'Plots need matplotlib; pip install "matplotlib>=.*"jinja2>='):
        plots.plot_bars({"a": {"b": 1}})
