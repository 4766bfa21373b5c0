"""Layers behind the towers: a projector of image embeddings, and the class embeddings of a teacher (PromptKD)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..heads import ClassHead
from ..towers import entry_of, execution_device
from .base_layer import CLIPPromptLayer
from .config import CLIPPromptTuningConfig
from .layout import PromptLayout
from .tensors import empty_linear, empty_vectors, trainable_dtype


TEACHER_EMBEDS = "learnable_teacher_embeds"
# What the wrapped class head does unless the layer does it itself.
OF_CLASS_HEAD = {name for name in vars(ClassHead) if not name.startswith("_")}


class ProjectorNorm(nn.BatchNorm1d):
    """
    The BatchNorm of the projector, which computes in the precision of its weights, also inside of autocast.

    The number of batches that it has seen is not saved with the adapter. It has no effect, since the running
    statistics have a momentum.
    """

    def __init__(self, width: int, like: torch.Tensor) -> None:
        super().__init__(width, device=like.device, dtype=trainable_dtype(like))
        self.register_buffer("num_batches_tracked", self.num_batches_tracked, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalizes (B, width) by the statistics of the batch in training, and by the running ones otherwise.

        Raises:
            ValueError: If a training batch is a single image, which has no variance.
        """
        if self.training and len(hidden) == 1:
            raise ValueError(
                "A training batch of a single image has no variance, by which the BatchNorm of the projector divides; "
                "take batches of two images or more, and leave out a smaller last one with dataloader_drop_last=True."
            )
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        # Files of adapters have no metadata, without which torch would expect `num_batches_tracked` in them.
        super()._load_from_state_dict(state_dict, prefix, {**local_metadata, "version": self._version}, *args)


class CLIPProjectedImages(CLIPPromptLayer):
    """
    Wraps the image head of a classifier, and maps image features to the width of a teacher's class embeddings.

    The projector is Linear, BatchNorm, ReLU, Linear. Its running statistics are saved with the adapter. In distributed
    training they are those of the first process, as in any model with BatchNorm under torch's DDP.

    **Attributes**:
        - **learnable_projector_in**, **learnable_projector_norm**, **learnable_projector_out** (`nn.ModuleDict`): The
          layers of the projector of each adapter.

    Source: Li et al., PromptKD: Unsupervised Prompt Distillation for Vision-Language Models (CVPR 2024).
    """

    adapter_layer_names = ("learnable_projector_in", "learnable_projector_norm", "learnable_projector_out")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.learnable_projector_in, self.learnable_projector_out = nn.ModuleDict({}), nn.ModuleDict({})
        self.learnable_projector_norm = nn.ModuleDict({})

    def update_layer(self, adapter_name: str, layout: PromptLayout, width_in: int, like: torch.Tensor) -> None:
        """Adds the projector of an adapter, not initialized, for image features of the width `width_in`."""
        self._begin(adapter_name, layout)
        self.in_features, self.out_features = width_in, layout.projection_dim
        self.learnable_projector_in[adapter_name] = empty_linear(width_in, layout.projection_dim, like)
        self.learnable_projector_norm[adapter_name] = ProjectorNorm(layout.projection_dim, like)
        self.learnable_projector_out[adapter_name] = empty_linear(layout.projection_dim, layout.projection_dim, like)

    def reset_adapter_parameters(self, adapter_name: str, config: CLIPPromptTuningConfig) -> None:
        """Initializes the projector of an adapter as torch does."""
        for name in self.adapter_layer_names:
            getattr(self, name)[adapter_name].reset_parameters()

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Maps image features (B, E) to (B, projection_dim)."""
        image_embeds, names = self.base_layer(image_embeds), self._active_here()
        if self.disable_adapters or not names:
            return image_embeds
        self._check_weights(names[0])
        first, norm, second = (getattr(self, name)[names[0]] for name in self.adapter_layer_names)
        hidden = first(image_embeds.to(execution_device(first), first.weight.dtype))
        return second(norm(hidden).relu().to(second.weight.dtype))


class CLIPTeacherClasses(CLIPPromptLayer):
    """
    Wraps the class head of a classifier, and holds class embeddings of a teacher in place of those of the prompts.

    They are saved with the adapter and not trained. With them, the text tower is not needed to classify.

    **Attributes**:
        - **learnable_teacher_embeds** (`nn.ParameterDict`): (C, projection_dim) for each adapter, normalized, in the
          order of the `teacher_class_names` of its configuration. The name says that it belongs to an adapter.
    """

    adapter_layer_names = (TEACHER_EMBEDS,)
    other_param_names = (*CLIPPromptLayer.other_param_names, "prompt_configs", "_missing")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.learnable_teacher_embeds = nn.ParameterDict({})
        self.prompt_configs: dict[str, CLIPPromptTuningConfig] = {}  # what is saved
        self._missing: dict[str, set[str]] = {}  # by adapter, the classes without embeddings
        self._rows: tuple[tuple, torch.Tensor] | None = None  # the last choice of rows

    def update_layer(
        self, adapter_name: str, layout: PromptLayout, config: CLIPPromptTuningConfig, like: torch.Tensor
    ) -> None:
        """Adds room for the class embeddings of an adapter. An older adapter of that name is replaced."""
        self._begin(adapter_name, layout)
        self.prompt_configs[adapter_name] = config
        self._missing.pop(adapter_name, None)
        shape = (len(config.teacher_class_names), layout.projection_dim)
        embeds = empty_vectors(shape, like)
        self.learnable_teacher_embeds[adapter_name] = nn.Parameter(embeds, requires_grad=False)

    @torch.no_grad()
    def reset_adapter_parameters(self, adapter_name: str, config: CLIPPromptTuningConfig) -> None:
        """Marks all class embeddings of an adapter as missing."""
        self.learnable_teacher_embeds[adapter_name].fill_(float("nan"))
        self._missing[adapter_name] = set(config.teacher_class_names)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.learnable_teacher_embeds.requires_grad_(False)

    @property
    def teacher_adapter(self) -> str | None:
        """The active adapter with class embeddings of a teacher, `None` without one."""
        return None if self.disable_adapters else next(iter(self._active_here()), None)

    @torch.inference_mode(False)  # inference tensors could not be used in a later training
    @torch.no_grad()
    def set_teacher_class_embeds(self, class_embeds: torch.Tensor, class_names: Sequence[str]) -> None:
        """Sets the embeddings (K, projection_dim) of K classes, normalized or not. Others are kept.

        Raises:
            ValueError: If the shape is another one, or values are not finite.
        """
        name = self.teacher_adapter
        if name is None:
            self.base_layer.set_teacher_class_embeds(class_embeds, class_names)  # which raises
        config, held = self.prompt_configs[name], entry_of(self.learnable_teacher_embeds, name)
        shape = (len(class_names), held.shape[1])
        if tuple(class_embeds.shape) != shape:
            raise ValueError(
                f"The class embeddings of the teacher must be {shape}, one for each of {len(class_names)} classes in "
                f"the width projection_dim={shape[1]} of adapter {name!r}, got {tuple(class_embeds.shape)}."
            )
        class_embeds = nn.functional.normalize(class_embeds.detach().clone().to(held.device, torch.float32), dim=1)
        if not torch.isfinite(class_embeds).all():
            raise ValueError("The class embeddings of the teacher hold NaN or Inf.")
        known = config.teacher_class_names
        added = [class_name for class_name in class_names if class_name not in known]
        embeds = torch.cat([held, held.new_zeros(len(added), shape[1])])
        config.teacher_class_names = [*known, *added]
        row_of = {class_name: row for row, class_name in enumerate(config.teacher_class_names)}
        rows = torch.tensor([row_of[class_name] for class_name in class_names], device=held.device)
        embeds[rows] = class_embeds.to(held.dtype)
        if added:
            self.learnable_teacher_embeds[name] = nn.Parameter(embeds, requires_grad=False)
        else:
            held.copy_(embeds)  # in place, for what refers to it
        self._missing[name] = self._missing.get(name, set()) - set(class_names)

    def check_class_names(self, class_names: Sequence[str]) -> None:
        """Raises `ValueError` if the active adapter has no place for embeddings of a class."""
        name = self.teacher_adapter
        if name is None:
            return
        known = set(self.prompt_configs[name].teacher_class_names)
        unknown = [class_name for class_name in class_names if class_name not in known]
        if unknown:
            shown = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise ValueError(
                f"Adapter {name!r} knows no class {shown}: it compares images with class embeddings of its teacher, "
                "and makes none of its own. Let the teacher make them first: "
                "model.set_teacher_class_embeds(teacher.get_class_embeds(), teacher.class_names)."
            )

    def class_embeds(self, class_names: Sequence[str] | None, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Returns the embeddings (C, projection_dim) of the active adapter's teacher, without encoding anything.

        Raises:
            ValueError: If they were not set.
        """
        name = self.teacher_adapter
        if name is None:
            return self.base_layer.class_embeds(class_names, encode)
        self._check_weights(name)
        missing = [class_name for class_name in class_names if class_name in self._missing.get(name, ())]
        if missing:
            raise ValueError(
                f"Adapter {name!r} has no class embeddings of a teacher yet (for {missing[0]!r}, ...); train it with "
                "DistillationTrainer(teacher=...), or call model.set_teacher_class_embeds(teacher.get_class_embeds())."
            )
        embeds, known = entry_of(self.learnable_teacher_embeds, name), self.prompt_configs[name].teacher_class_names
        embeds = embeds.to(trainable_dtype(embeds))  # of a model in half precision, as other class embeddings
        return embeds if list(class_names) == known else embeds[self._rows_of(class_names, known, embeds.device)]

    def _rows_of(self, class_names: Sequence[str], known: list[str], device: torch.device) -> torch.Tensor:
        key, kept = (tuple(class_names), tuple(known), device), self._rows
        if kept is None or kept[0] != key:  # copying it to the device anew would wait for it
            row_of = {class_name: row for row, class_name in enumerate(known)}
            kept = key, torch.tensor([row_of[class_name] for class_name in class_names], device=device)
            self._rows = kept
        return kept[1]  # and not `self._rows`, which another thread may have replaced

    def __getattr__(self, name):
        if name in OF_CLASS_HEAD:
            return getattr(self.base_layer, name)
        return super().__getattr__(name)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """Returns the logits as the wrapped head does."""
        return self.base_layer(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in [name for name in self._missing if f"{prefix}{TEACHER_EMBEDS}.{name}" in state_dict]:
            del self._missing[name]
