"""Distillation of a teacher into an adapter on images without labels (PromptKD): the loss and the Trainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import Trainer

from ..loss import TEACHER, TEACHER_LOGITS
from ..modeling import PromptClassificationMixin, classifier_in
from ..regularizers.promptsrc import mean_divergence
from ..towers import execution_device
from ..tuner.base_config import MULTI_LABEL


# What image processors of the families return besides pixel values.
FURTHER_INPUTS = ("pixel_attention_mask", "spatial_shapes")
LABELS = ("labels", "label", "label_ids")
MAX_SHOWN = 5
STUDENT, OF_TEACHER = "DistillationTrainer", "The argument teacher of DistillationTrainer"  # in messages

logger = logging.getLogger(__name__)


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, kd_weight: float = 1000.0, temperature: float = 1.0
) -> torch.Tensor:
    """
    Returns `kd_weight * temperature**2 * KL(teacher || student)`, summed over images and classes, divided by B C.

    Args:
        logits (`torch.Tensor`):
            (B, C), the logits of the student.
        teacher_logits (`torch.Tensor`):
            (B, C), those of the teacher for the same images and classes, on any device.
        kd_weight (`float`, *optional*, defaults to 1000.0):
            The weight. The authors take 1000, and 200 for three of their eleven data sets.
        temperature (`float`, *optional*, defaults to 1.0):
            By which both logits are divided.

    Returns:
        `torch.Tensor`: The loss, a single value in float32.

    Raises:
        ValueError: If the shapes differ.

    Example:

    ```py
    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> distillation_loss(logits, teacher_logits=logits)
    tensor(0.)
    ```
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"The logits of the teacher must be {tuple(logits.shape)}, one for each image and class of the student, "
            f"got {tuple(teacher_logits.shape)}."
        )
    teacher_logits = teacher_logits.detach().to(logits.device, torch.float32)
    return kd_weight * temperature**2 * mean_divergence(logits.float() / temperature, teacher_logits / temperature)


class DistillationTrainer(Trainer):
    """
    The `Trainer` of transformers with the loss of a teacher in place of that of labels.

    It trains the active adapter of a classifier to answer as the teacher does. A subclass is needed, since a
    `compute_loss_func` of the stock `Trainer` sees neither the inputs of the teacher nor images without labels.

    The loss is [`distillation_loss`], on images whose labels are not used, if they have any. What a batch holds
    decides where the teacher's logits come from:

    - `teacher_logits` (B, C), of [`~data.cache_teacher_logits`], for views that are the same in each epoch;
    - `teacher_pixel_values`, which the teacher sees in each step, of [`~data.with_pixel_values`] with a
      `teacher_processor`;
    - neither: the teacher sees the `pixel_values` of the student, which it must be made for, too.

    An evaluation during training is as that of any `Trainer`, with labels. If the adapter has a `projection_dim`, the
    class embeddings of the teacher are computed once, and saved with it.

    Args:
        teacher (`PromptClassificationMixin` or `PeftModel`, *optional*):
            A classifier of any family with the classes of the student in the same order, with or without adapters. It
            is put into evaluation mode, and computes where it is and in its own precision. `None` if the logits are in
            the data set, and the adapter has the class embeddings.
        kd_weight, temperature (`float`, *optional*):
            See [`distillation_loss`].

    Raises:
        TypeError: If the teacher or the model is no classifier.
        ValueError: If the classes of the teacher are not those of the student, the two share modules, the width of the
            teacher's class embeddings is not the `projection_dim`, or a setting is invalid.

    Example:

    ```py
    >>> model = get_peft_model(model, method_config("promptkd", model, projection_dim=teacher.embed_width))
    >>> images = cache_teacher_logits(images, teacher, teacher_processor)
    >>> train_set = with_pixel_values(images, image_processor, unlabeled=True)
    >>> trainer = DistillationTrainer(model, args, teacher=teacher, train_dataset=train_set)
    >>> trainer.train()
    ```
    """

    def __init__(
        self, model=None, args=None, *positional, teacher=None, kd_weight=1000.0, temperature=1.0, **kwargs
    ) -> None:
        for name, value in (("kd_weight", kd_weight), ("temperature", temperature)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        self.teacher, self.kd_weight, self.temperature = teacher, kd_weight, temperature
        if model is not None:
            _prepare(model, teacher)
        super().__init__(model, args, *positional, **kwargs)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "Distillation has a loss of its own, without labels; leave out label_smoothing_factor and "
                "compute_loss_func."
            )
        if teacher is not None:
            device = execution_device(teacher)
            if device.type != self.args.device.type:
                logger.warning(
                    "The teacher computes on %s, the student on %s. Call teacher.to(%r) first if that is not meant.",
                    device,
                    self.args.device,
                    str(self.args.device),
                )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names = ("logits", "pixel_values", *FURTHER_INPUTS)
        own = self._signature_columns or ()
        self._signature_columns = [*own, *(f"{TEACHER}{name}" for name in names)]  # type: ignore[assignment]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student_inputs, teacher_inputs = _split(inputs)
        if not model.training:
            return super().compute_loss(model, student_inputs, return_outputs, num_items_in_batch)
        student_inputs = {name: value for name, value in student_inputs.items() if name not in LABELS}
        outputs = model(**student_inputs)
        teacher_logits = self.teacher_logits(student_inputs, teacher_inputs)
        loss = distillation_loss(outputs.logits, teacher_logits, self.kd_weight, self.temperature)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        return super().prediction_step(model, _split(inputs)[0], *args, **kwargs)

    @torch.no_grad()
    def teacher_logits(self, student_inputs: Mapping, teacher_inputs: Mapping) -> torch.Tensor:
        """Returns the logits (B, C) of the teacher for a batch."""
        if "logits" in teacher_inputs:
            return teacher_inputs["logits"]
        if self.teacher is None:
            raise ValueError(
                f"There is no teacher, and the data set has no column {TEACHER_LOGITS!r}; pass teacher=..., or make "
                "the column with cache_teacher_logits of clip_prompt_peft.data."
            )
        if not teacher_inputs:
            _check_same_pixels(classifier_in(self.model, STUDENT), classifier_in(self.teacher, OF_TEACHER))
            teacher_inputs = student_inputs
        self.teacher.eval()
        device, dtype = execution_device(self.teacher), classifier_in(self.teacher, OF_TEACHER).dtype
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in teacher_inputs.items()
            if isinstance(value, torch.Tensor)
        }
        return self.teacher(**moved).logits


def _split(inputs: Mapping) -> tuple[dict, dict]:
    """Returns the inputs of the student, and those of the teacher by the names that they have there."""
    student = {name: value for name, value in inputs.items() if not name.startswith(TEACHER)}
    teacher = {name.removeprefix(TEACHER): value for name, value in inputs.items() if name.startswith(TEACHER)}
    return student, teacher


def _prepare(model: nn.Module, teacher: nn.Module | None) -> None:
    """Checks that student and teacher fit, and gives the student the class embeddings that it compares with."""
    student = classifier_in(model, STUDENT)
    layout = student.prompt_layout
    compares_with_teacher = layout is not None and layout.projection_dim is not None
    if student.config.problem_type == MULTI_LABEL:
        raise ValueError(
            "The loss of distillation compares how probable each class is to be the one of an image, but the model "
            f"has problem_type={MULTI_LABEL!r}."
        )
    if teacher is None:
        if compares_with_teacher:
            student.get_class_embeds()  # raises if there are none
        return
    source = classifier_in(teacher, OF_TEACHER)
    shared = {*student.modules()} & {*source.modules()}
    if shared:
        raise ValueError(
            "The teacher and the student are one model, or share modules, so that training would change the teacher; "
            "load the teacher a second time."
        )
    check_same_classes(source.class_names, student.class_names)
    if source.config.problem_type == MULTI_LABEL:
        raise ValueError(f"The teacher has problem_type={MULTI_LABEL!r}, and the student one label for each image.")
    if compares_with_teacher:
        student.set_teacher_class_embeds(_class_embeds(source, layout.projection_dim), source.class_names)


@torch.no_grad()
def _class_embeds(teacher: PromptClassificationMixin, width: int) -> torch.Tensor:
    """Returns the class embeddings (C, width) of a teacher."""
    if getattr(teacher.prompt_layout, "image_conditioned", False):
        raise ValueError(
            "The teacher makes its class embeddings for each image (image_conditioned), so there are none to save "
            "with the student; take another teacher, or a student without projection_dim."
        )
    teacher.eval()
    embeds = teacher.get_class_embeds()
    if embeds.shape[1] != width:
        raise ValueError(
            f"The class embeddings of the teacher have the width {embeds.shape[1]}, and the adapter of the student "
            f"has projection_dim={width}; make the adapter with projection_dim={embeds.shape[1]}."
        )
    return embeds


def check_same_classes(teacher: Sequence[str] | None, student: Sequence[str] | None) -> None:
    """Raises `ValueError` unless teacher and student have the same classes in the same order."""
    for role, names in (("teacher", teacher), ("student", student)):
        if names is None:
            raise ValueError(f"The {role} has no class names; call set_class_names([...]) or load it with some.")
    if list(teacher) == list(student):
        return
    only = {
        "teacher": [name for name in teacher if name not in student],
        "student": [name for name in student if name not in teacher],
    }
    parts = [
        f"only the {role} has {', '.join(map(repr, names[:MAX_SHOWN]))}{', ...' if len(names) > MAX_SHOWN else ''}"
        for role, names in only.items()
        if names
    ]
    if not parts:
        label = next(label for label, (one, other) in enumerate(zip(teacher, student)) if one != other)
        parts = [f"in another order: class {label} of the teacher is {teacher[label]!r}, and {student[label]!r} here"]
    raise ValueError(
        f"The classes of the teacher are not those of the student ({'; '.join(parts)}). Give both the same: "
        "teacher.set_class_names(model.class_names)."
    )


def _check_same_pixels(student: PromptClassificationMixin, teacher: PromptClassificationMixin) -> None:
    """Raises `ValueError` unless the pixel values of the student are made as those of the teacher."""
    sizes = [getattr(model.config.vision_config, "image_size", "any number of") for model in (student, teacher)]
    kinds = [type(model).family_name() for model in (student, teacher)]
    if len(set(sizes)) > 1 or len(set(kinds)) > 1:
        raise ValueError(
            f"The teacher is a {kinds[1]} for images of {sizes[1]} pixels, and the student a {kinds[0]} for "
            f"{sizes[0]}, so they need pixel values of their own: with_pixel_values(dataset, image_processor, "
            "teacher_processor=...), or cache_teacher_logits."
        )
