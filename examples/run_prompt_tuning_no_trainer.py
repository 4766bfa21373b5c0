#!/usr/bin/env python
"""Tunes the prompt of a CLIP on a few images per class, in a training loop of its own with Accelerate.

What run_prompt_tuning.py does with the Trainer is written out here, to be changed. Without arguments it runs on the
pictures that come with the examples. With data of your own, and several processes:

    python run_prompt_tuning_no_trainer.py --train_dir pets/train --test_dir pets/test
    accelerate launch run_prompt_tuning_no_trainer.py --dataset_name user/pets --augment
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from epoch_checkpoints import Checkpoints, find_checkpoint
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, EvalPrediction, default_data_collator, get_scheduler

from clip_prompt_peft import AutoModelForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.commands.arguments import use_one_thread_if_tiny
from clip_prompt_peft.commands.tables import results_table
from clip_prompt_peft.data import (
    cache_image_embeds,
    class_names_of,
    hold_out,
    load_image_dataset,
    sample_few_shot,
    with_pixel_values,
)
from clip_prompt_peft.data.known_datasets import STYLES, load_style
from clip_prompt_peft.evaluation.metrics import compute_metrics


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tunes the prompt of a CLIP in a loop with Accelerate.")
    parser.add_argument("--model_name_or_path", default=TINY_CLIP, help="Hub id or folder of a CLIP")
    parser.add_argument("--style", choices=STYLES, default=STYLES[0], help="of the pictures of the examples")
    parser.add_argument("--dataset_name", help="an image classification data set of the Hub")
    parser.add_argument("--train_dir", help="folder with training images, in one sub-folder for each class")
    parser.add_argument("--test_dir", help="the same to test on; without, a fifth of the training images is held out")
    parser.add_argument("--shots", type=int, default=16, help="training images per class")
    parser.add_argument("--augment", action="store_true", help="random resized crops and mirroring in training")
    parser.add_argument("--prompt_template", default="a photo of a {}.", help="the prompt to start from")
    parser.add_argument("--num_virtual_tokens", type=int, help="by default one for each word in front of {}")
    parser.add_argument("--num_train_epochs", type=int, default=100)
    parser.add_argument("--per_device_train_batch_size", type=int, default=32)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1, help="draws the images and orders them")
    parser.add_argument("--output_dir", default="outputs/prompt_tuning_no_trainer", help="where the adapter goes")
    parser.add_argument("--checkpointing_steps", choices=["epoch"], help="save a checkpoint after every epoch")
    parser.add_argument("--resume_from_checkpoint", metavar="FOLDER", help="to continue from; 'true' takes the last")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="where to push the adapter")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    # Without being told to use the CPU, accelerate does not connect several processes where there is no GPU.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    set_up_logging(accelerator)
    try:
        config = CLIPPromptTuningConfig(
            num_virtual_tokens=args.num_virtual_tokens, prompt_template=args.prompt_template
        )
        with accelerator.main_process_first():
            train_images, test_images = load_data(args)
        model = AutoModelForPromptClassification.from_pretrained(
            args.model_name_or_path, class_names=class_names_of(train_images), prompt_template=args.prompt_template
        )
        image_processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
        checkpoint = find_checkpoint(args)
    except (ValueError, OSError) as error:  # what can be wrong with what was asked for
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")

    use_one_thread_if_tiny(args.model_name_or_path)
    # The image tower is frozen: unless every epoch sees other crops, it need run only once.
    model.to(accelerator.device)
    if args.augment:
        train_set = with_pixel_values(train_images, image_processor, augment=True)
    else:
        train_set = cache_image_embeds(train_images, model, image_processor)
    test_set = cache_image_embeds(test_images, model, image_processor)

    set_seed(args.seed)
    model = get_peft_model(model, config)
    loader = DataLoader(
        train_set, batch_size=args.per_device_train_batch_size, shuffle=True, collate_fn=default_data_collator
    )
    test_loader = DataLoader(test_set, batch_size=64, collate_fn=default_data_collator)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0)
    # Counted before `prepare`: a prepared scheduler makes as many steps at once as there are processes.
    num_steps = args.num_train_epochs * -(-len(loader) // args.gradient_accumulation_steps)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=num_steps)
    model, optimizer, loader, test_loader, scheduler = accelerator.prepare(
        model, optimizer, loader, test_loader, scheduler
    )
    peft_model = accelerator.unwrap_model(model)

    accelerator.print(f"Tuning {describe(peft_model)} on {len(train_set)} images, testing on {len(test_set)}")
    accelerator.print(f"Running on {accelerator.device.type}, number of processes: {accelerator.num_processes}")
    with peft_model.disable_adapter():
        zero_shot = evaluate(accelerator, peft_model, test_loader)
    checkpoints = Checkpoints(accelerator, args.output_dir if args.checkpointing_steps else None)
    epochs = range(checkpoints.resume(checkpoint), args.num_train_epochs)
    train(accelerator, model, optimizer, scheduler, loader, epochs, checkpoints)
    tuned = evaluate(accelerator, peft_model, test_loader)

    if accelerator.is_main_process:
        peft_model.card_metrics = tuned
        peft_model.save_pretrained(args.output_dir)
        if args.push_to_hub:
            peft_model.push_to_hub(args.push_to_hub)
        print(f"\nPercent of images classified correctly\n\n{results_table({'test': zero_shot}, [{'test': tuned}])}\n")
        print(f"Saved {args.output_dir}")
    accelerator.end_training()


def set_up_logging(accelerator: Accelerator) -> None:
    datasets.disable_progress_bars()
    if not accelerator.is_main_process:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    # peft reads a property of the model that transformers has renamed; nothing that a user can change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def load_data(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """The drawn training images, and the test images."""
    when_fewer = "error"
    if args.dataset_name or args.train_dir:
        folders = {"train": args.train_dir, "test": args.test_dir}
        folders = {split: folder for split, folder in folders.items() if folder is not None}
        splits = load_image_dataset(args.dataset_name, folders=folders)
    else:
        splits = load_style(args.style)
        when_fewer = "all"  # some classes have a little fewer than 16
    train_images, test_images = splits["train"], splits.get("test", splits.get("validation"))
    if test_images is None:
        train_images, test_images = hold_out(train_images, 0.2)
    return sample_few_shot(train_images, args.shots, seed=args.seed, when_fewer=when_fewer), test_images


def describe(peft_model) -> str:
    config = peft_model.active_peft_config
    trainable, everything = peft_model.get_nb_trainable_parameters()
    return f"{config.num_virtual_tokens} vectors ({trainable} of {everything} parameters)"


def train(accelerator, model, optimizer, scheduler, loader, epochs: range, checkpoints: Checkpoints) -> None:
    progress = tqdm(epochs, desc="Epochs", disable=not accelerator.is_main_process)
    for epoch in progress:
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if not torch.isfinite(loss):
            sys.exit(
                f"The loss of epoch {epoch + 1} is {loss.item()}. Nothing more is saved. Try a lower --learning_rate."
            )
        progress.set_postfix(loss=f"{loss.item():.3f}")
        checkpoints.save(epoch + 1)


@torch.no_grad()
def evaluate(accelerator, model, loader) -> dict[str, float]:
    model.eval()
    logits, labels = [], []
    for batch in loader:
        batch_labels = batch.pop("labels")
        gathered = accelerator.gather_for_metrics((model(**batch).logits, batch_labels))
        logits.append(gathered[0].cpu())
        labels.append(gathered[1].cpu())
    return compute_metrics(EvalPrediction(torch.cat(logits).numpy(), torch.cat(labels).numpy()))


if __name__ == "__main__":
    main()
