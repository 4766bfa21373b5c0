"""Checks of labels: at once on a CPU, and on other devices one step later, so that the host does not wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from .tuner.base_config import MULTI_LABEL


IGNORED_LABEL = -100  # the default ignore_index of torch.nn.CrossEntropyLoss


class LabelCheck:
    """
    Checks the labels of every forward pass of a classifier.

    On a CPU, and in evaluation, they are checked at once. In a training step on another device, reading a value would
    make the host wait for all work before it. So the labels are copied to the host while it goes on, wrong ones are
    replaced by the ignored label -100, and the copy is checked by [`~LabelCheck.read`], which the classifier calls in
    its next forward pass, when its mode is set and before it is saved.

    It can be shared by threads. Copies and pickles hold no copied labels; they are checked before.

    Args:
        at_once_on (`Sequence[str]`, *optional*, defaults to `("cpu",)`):
            The types of devices whose labels are always checked at once.
    """

    def __init__(self, at_once_on: Sequence[str] = ("cpu",)) -> None:
        self.at_once_on = tuple(at_once_on)
        self._unread: deque[tuple] = deque()

    def __getstate__(self) -> dict:
        self.read()
        return {"at_once_on": self.at_once_on}

    def __setstate__(self, state: dict) -> None:
        self.at_once_on = state["at_once_on"]
        self._unread = deque()

    def __call__(
        self, labels: torch.Tensor, class_names: Sequence[str], problem_type: str | None, is_training: bool
    ) -> torch.Tensor:
        """Checks labels, or remembers to do so.

        Args:
            labels (`torch.Tensor`):
                (B,) class indices, whole numbers of any type, or (B, C) zeros and ones if multi-label.
            class_names (`Sequence[str]`):
                The C classes.
            problem_type (`str`, *optional*):
                `config.problem_type` of the classifier.
            is_training (`bool`):
                Whether a gradient is computed. Otherwise, labels are checked at once on every device.

        Returns:
            `torch.Tensor`: The labels. If they are checked later, wrong ones are replaced by -100.

        Raises:
            TypeError: If labels are no tensor.
            ValueError: If their shape is wrong, or values are and they are checked at once.
        """
        check_shape(labels, class_names, problem_type)
        if problem_type == MULTI_LABEL:
            return labels
        if not is_training or labels.device.type in self.at_once_on:
            check_indices(labels, class_names)
            return labels
        if not labels.is_meta:  # such a tensor has no values
            self._unread.append((*_on_its_way_to_the_host(labels), tuple(class_names), labels.device))
        return without_wrong_indices(labels, len(class_names))

    def read(self) -> None:
        """Checks the labels of earlier training steps that have not been checked yet.

        Raises:
            ValueError: If one of them is wrong.
        """
        while self._unread:
            try:
                labels, event, class_names, device = self._unread.popleft()
            except IndexError:  # another thread was faster
                return
            if event is not None:
                event.synchronize()
            try:
                check_indices(labels.cpu(), class_names)
            except ValueError as error:
                raise ValueError(
                    f"{error} The label was in an earlier batch: labels on {str(device)!r} are checked after the "
                    "step, so up to one step was taken, without the images whose labels are wrong. Load the last "
                    "checkpoint to undo it."
                ) from None


def check_shape(labels: torch.Tensor, class_names: Sequence[str], problem_type: str | None) -> None:
    """Raises `TypeError` or `ValueError` unless labels are a tensor (B,), or (B, C) if multi-label."""
    if not isinstance(labels, torch.Tensor):
        raise TypeError(f"labels must be a tensor, got a {type(labels).__name__}; use torch.as_tensor(labels).")
    if problem_type == MULTI_LABEL:
        num_classes = len(class_names)
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(
                f"With problem_type={MULTI_LABEL!r} labels are (B, {num_classes}) zeros and ones, one for each class "
                f"({', '.join(class_names[:5])}, ...), got the shape {tuple(labels.shape)}."
            )
    elif labels.ndim != 1:
        raise ValueError(
            f"labels must be (B,), the index of one class for each image, got the shape {tuple(labels.shape)}. Zeros "
            "and ones for each class become indices with labels.argmax(dim=-1); for images with several classes set "
            f"config.problem_type = {MULTI_LABEL!r}."
        )


def check_indices(labels: torch.Tensor, class_names: Sequence[str]) -> None:
    """Raises `ValueError` unless all labels (B,) are class indices or the ignored label."""
    if labels.is_floating_point() and (labels != labels.round()).any():  # also true for NaN
        bad = labels[labels != labels.round()]
        raise ValueError(
            f"labels must be class indices, got {float(bad[0])}"
            + (", which stands for a missing label; leave out such images." if bad[0].isnan() else ".")
        )
    indices, num_classes = labels.long(), len(class_names)
    bad = indices[~_are_indices(indices, num_classes)]
    if bad.numel():
        hint = " Often -1 stands for no label; leave such images out." if bad[0] == -1 else ""
        raise ValueError(
            f"Label {int(bad[0])} is out of range: the model has {num_classes} classes, so labels go from 0 to "
            f"{num_classes - 1}.{hint} Compare the data set's label names with the model's class_names "
            f"({', '.join(class_names[:5])}, ...)."
        )


def without_wrong_indices(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Replaces what [`check_indices`] refuses by the ignored label, without reading a value."""
    indices = labels.long()
    is_right = _are_indices(indices, num_classes)
    if labels.is_floating_point():
        is_right = is_right & (labels == labels.round())
    return indices.masked_fill(~is_right, IGNORED_LABEL)


def _are_indices(indices: torch.Tensor, num_classes: int) -> torch.Tensor:
    # of int64, since a small type may not hold the numbers that they are compared with
    return ((indices >= 0) & (indices < num_classes)) | (indices == IGNORED_LABEL)


def _on_its_way_to_the_host(labels: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Returns a copy of labels, and the event after which it can be read; without one, it is on the device."""
    if labels.device.type != "cuda":
        return labels.detach().clone(), None
    copied = labels.detach().to("cpu", non_blocking=True)  # into pinned memory
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(labels.device))
    return copied, event
