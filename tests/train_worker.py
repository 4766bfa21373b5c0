"""What every process of test_distributed.py runs: a few steps of the stock Trainer on the embedded CLIP.

train_worker.py OUTPUT_DIR BATCH_SIZE_PER_PROCESS ACCUMULATION_STEPS FIND_UNUSED_PARAMETERS(0 or 1)
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig


TINY_CLIP = str(Path(__file__).parent.parent / "examples" / "assets" / "tiny_clip")


def train(output_dir: str, batch_size: int, accumulation_steps: int, find_unused_parameters: bool) -> None:
    """Leaves the adapter and result.json in `output_dir`."""
    torch.manual_seed(0)
    images = torch.randn(18, 3, 48, 48)  # 18 is no multiple of a global batch of 8: what is over is dropped
    dataset = Dataset.from_dict({"pixel_values": images.numpy(), "labels": [i % 3 for i in range(18)]})
    classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=["cat", "plant", "red car"])
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation_steps,
        dataloader_drop_last=True,
        max_steps=6,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        ddp_find_unused_parameters=find_unused_parameters,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=get_peft_model(classifier, CLIPPromptTuningConfig()),
        args=args,
        train_dataset=dataset.with_format("torch"),
    )
    trainer.train()
    metrics = trainer.evaluate(dataset.with_format("torch"))
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {"losses": losses, "eval_loss": metrics["eval_loss"], "num_processes": args.world_size}
        Path(output_dir, "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
