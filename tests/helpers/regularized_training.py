"""A few steps of training with a regularizer on the embedded CLIP, for test_prograd_trainer.py."""

import torch
from peft import get_peft_model
from transformers import TrainingArguments

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig, ProGradTrainer
from clip_prompt_peft.assets import TINY_CLIP


def examples():
    images = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]


def train(
    regularizer: str,
    output_dir: str,
    batch_size: int,
    accumulation_steps: int,
    trainer_class=ProGradTrainer,
    **arguments,
) -> None:
    """Leaves the adapter in `output_dir`; vision prompts too, so that there are several tensors to project."""
    torch.manual_seed(0)
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["cat", "plant", "red car"])
    vision = {"num_vision_virtual_tokens": 2, "vision_prompt_depth": 2}
    config = CLIPPromptTuningConfig(
        regularizer=regularizer, prompt_tuning_init="RANDOM", num_virtual_tokens=4, **vision
    )
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation_steps,
        max_steps=4,
        optim="sgd",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = trainer_class(model=get_peft_model(classifier, config), args=args, train_dataset=examples())
    trainer.train()
    trainer.save_model()
