r"""Tunes the prompt of a CLIP on 16 images per class, three times, with the Trainer of transformers.

    python run_prompt_tuning.py     # the embedded tiny CLIP, on the embedded pictures
    python run_prompt_tuning.py --train_dir pets/train --test_dir pets/test \
        --model_name_or_path openai/clip-vit-base-patch16

A short script to copy and change. `clip-prompt train` has arguments for everything.
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoImageProcessor, Trainer, TrainingArguments, set_seed

from clip_prompt_peft import AutoModelForPromptClassification, CLIPPromptTuningConfig, training_recipe
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.commands.common import results_table, silence_libraries, use_one_thread_if_tiny
from clip_prompt_peft.data import cache_image_embeds, class_names_of, load_image_dataset, sample_few_shot
from clip_prompt_peft.data.known_datasets import STYLES, load_style
from clip_prompt_peft.evaluation.metrics import compute_metrics


SEEDS = (1, 2, 3)
OUTPUT_DIR = "outputs/run_prompt_tuning"


def evaluate(trainer, test_sets):
    return {
        name: {key.removeprefix("test_"): value for key, value in trainer.predict(test_set).metrics.items()}
        for name, test_set in test_sets.items()
    }


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", default=TINY_CLIP, help="Hub id or folder of a CLIP")
parser.add_argument("--train_dir", help="folder of training images, with one sub-folder for each class")
parser.add_argument("--test_dir", help="the same to test on")
args = parser.parse_args()
if bool(args.train_dir) != bool(args.test_dir):
    parser.error("--train_dir and --test_dir go together")
silence_libraries()
use_one_thread_if_tiny(args.model_name_or_path)

if args.train_dir:
    splits = load_image_dataset(folders={"train": args.train_dir, "test": args.test_dir})
    train_images, test_sets = splits["train"], {"test": splits["test"]}
else:
    styles = {style: load_style(style) for style in STYLES}
    train_images, test_sets = styles[STYLES[0]]["train"], {style: styles[style]["test"] for style in STYLES}

model = AutoModelForPromptClassification.from_pretrained(
    args.model_name_or_path, class_names=class_names_of(train_images)
)
image_processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, **model.hub_settings.arguments)
model.to("cuda" if torch.cuda.is_available() else "cpu")
# The image tower is frozen, so it runs once for each image and not in every epoch.
test_sets = {name: cache_image_embeds(images, model, image_processor) for name, images in test_sets.items()}

zero_shot, tuned = None, []
for seed in SEEDS:
    drawn = sample_few_shot(train_images, num_shots=16, seed=seed, when_fewer="all")
    set_seed(seed)
    peft_model = get_peft_model(model, CLIPPromptTuningConfig(prompt_template="a photo of a {}."))
    recipe = training_recipe("default", peft_model, len(drawn), shots=16)  # epochs, learning rate, batch size
    training_args = TrainingArguments(
        f"{OUTPUT_DIR}/seed{seed}",
        **recipe.arguments,
        per_device_eval_batch_size=64,
        logging_steps=0.25,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = Trainer(
        peft_model,
        training_args,
        train_dataset=cache_image_embeds(drawn, model, image_processor),
        compute_metrics=compute_metrics,
        processing_class=image_processor,
    )
    trainer.train()
    tuned.append(evaluate(trainer, test_sets))
    if zero_shot is None:
        with peft_model.disable_adapter():
            zero_shot = evaluate(trainer, test_sets)
    trainer.save_model()  # the adapter, with class names and template, and the image processor
    model = peft_model.unload()

print(f"\nPercent of images classified correctly, mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}\n")
print(results_table(zero_shot, tuned))
print(f"\nSaved the adapters to {OUTPUT_DIR}. Classify images with")
print(f"    clip-prompt predict {OUTPUT_DIR}/seed{SEEDS[0]} IMAGE ...")
