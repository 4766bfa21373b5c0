"""Tunes the prompt of a CLIP on a few images per class, in a training loop of its own with Accelerate.

    python run_prompt_tuning_no_trainer.py      # the embedded tiny CLIP, on the embedded pictures
    torchrun --nproc_per_node 2 run_prompt_tuning_no_trainer.py --train_dir pets/train --test_dir pets/test

A short script to copy and change. `clip-prompt train` has arguments for everything.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, EvalPrediction, default_data_collator, get_scheduler

from clip_prompt_peft import AutoModelForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.commands.common import results_table, silence_libraries, use_one_thread_if_tiny
from clip_prompt_peft.data import cache_image_embeds, class_names_of, hold_out, load_image_dataset, sample_few_shot
from clip_prompt_peft.data.known_datasets import STYLES, load_style
from clip_prompt_peft.evaluation.metrics import compute_metrics


def find_checkpoint(folder, wanted):
    if wanted not in (None, "true"):
        if not Path(wanted).is_dir():
            raise ValueError(f"--resume_from_checkpoint {wanted!r} is no folder of a checkpoint, such as out/epoch_3.")
        return Path(wanted)
    last = max(Path(folder).glob("epoch_*[0-9]"), key=lambda path: int(path.name.split("_")[1]), default=None)
    if last and wanted is None:
        raise ValueError(f"{str(last)!r} is left of an earlier run; remove it, or --resume_from_checkpoint true.")
    return last


@torch.no_grad()
def evaluate():
    peft_model.eval()
    outputs = [accelerator.gather_for_metrics((peft_model(**batch).logits, batch["labels"])) for batch in test_loader]
    return compute_metrics(EvalPrediction(*(torch.cat(part).cpu().numpy() for part in zip(*outputs))))


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", default=TINY_CLIP, help="Hub id or folder of a CLIP")
parser.add_argument("--train_dir", help="folder of training images, with one sub-folder for each class")
parser.add_argument("--test_dir", help="the same to test on; by default a fifth of the training images is held out")
parser.add_argument("--shots", type=int, default=16, help="training images per class")
parser.add_argument("--num_train_epochs", type=int, default=100)
parser.add_argument("--learning_rate", type=float, default=2e-3)
parser.add_argument("--seed", type=int, default=1, help="draws the images and orders them")
parser.add_argument("--output_dir", default="outputs/prompt_tuning_no_trainer", help="folder for the adapter")
parser.add_argument("--checkpointing_steps", choices=["epoch"], help="save a checkpoint after every epoch")
parser.add_argument("--resume_from_checkpoint", metavar="FOLDER", help="to continue; 'true' takes the last")
args = parser.parse_args()
silence_libraries()
use_one_thread_if_tiny(name := args.model_name_or_path)
# Unless it is told to use the CPU, accelerate does not connect processes on machines without a GPU.
accelerator = Accelerator(cpu=not torch.accelerator.is_available())
try:
    folders = {"train": args.train_dir, "test": args.test_dir}
    folders = {split: folder for split, folder in folders.items() if folder}
    with accelerator.main_process_first():
        splits = load_image_dataset(folders=folders) if folders else load_style(STYLES[0])
    train, test = (splits["train"], splits["test"]) if "test" in splits else hold_out(splits["train"], 0.2)
    train = sample_few_shot(train, args.shots, seed=args.seed, when_fewer="all")
    model = AutoModelForPromptClassification.from_pretrained(name, class_names=class_names_of(train))
    image_processor = AutoImageProcessor.from_pretrained(name, **model.hub_settings.arguments)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
except (ValueError, OSError) as error:
    sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
model.to(accelerator.device)
# The image tower is frozen, so it runs once for each image and not in every epoch.
train, test = (cache_image_embeds(images, model, image_processor) for images in (train, test))

set_seed(args.seed)
model = get_peft_model(model, CLIPPromptTuningConfig(prompt_template="a photo of a {}."))
loader = DataLoader(train, batch_size=32, shuffle=True, collate_fn=default_data_collator)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.learning_rate, weight_decay=0)
# Steps of one process: a prepared scheduler makes as many steps at once as there are processes.
scheduler = get_scheduler("cosine", optimizer, 0, num_training_steps=args.num_train_epochs * len(loader))
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
test_loader = accelerator.prepare(DataLoader(test, batch_size=64, collate_fn=default_data_collator))
peft_model = accelerator.unwrap_model(model)
# Checkpoints contain the adapter and not the whole model.
accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
with peft_model.disable_adapter():
    zero_shot = evaluate()

finished = int(checkpoint.name.split("_")[1]) if checkpoint else 0
if checkpoint:
    accelerator.load_state(str(checkpoint))
    set_peft_model_state_dict(peft_model, load_peft_weights(str(checkpoint), device=str(accelerator.device)))
for epoch in range(finished + 1, args.num_train_epochs + 1):
    model.train()
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if not torch.isfinite(loss):
        sys.exit(f"The loss of epoch {epoch} is {loss.item()}, so nothing is saved. Try a lower --learning_rate.")
    if args.checkpointing_steps:
        folder = Path(args.output_dir, f"epoch_{epoch}.part")
        accelerator.save_state(str(folder))
        peft_model.save_pretrained(folder, is_main_process=accelerator.is_main_process)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.rename(folder.with_suffix(""))  # only complete checkpoints have the final name
tuned = evaluate()
if accelerator.is_main_process:
    peft_model.save_pretrained(args.output_dir)
    table = results_table({"test": zero_shot}, [{"test": tuned}])
    print(f"\nPercent of images classified correctly\n\n{table}\n\nSaved {args.output_dir}")
accelerator.end_training()
