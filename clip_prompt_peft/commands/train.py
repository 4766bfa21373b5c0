#!/usr/bin/env python
r"""Tunes the prompt of a CLIP on a few images per class, with the Trainer of transformers.

Without arguments it does so on the pictures that come with the examples, three times, and prints the accuracy beside
that of the zero-shot model. With data of your own:

    python run_prompt_tuning.py --train_dir pets/train --test_dir pets/test
    python run_prompt_tuning.py --train_file pets.parquet --label_column_name breed --shots 4
    python run_prompt_tuning.py --dataset_name user/pets --model_name_or_path openai/clip-vit-base-patch16 \
        --shots 16 --push_to_hub
    accelerate launch run_prompt_tuning.py --dataset_name user/pets --augment --dataloader_num_workers 4
    python run_prompt_tuning.py --method maple
    python run_prompt_tuning.py settings.yaml
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import replace

import datasets
import transformers
from datasets import Dataset, DatasetDict
from huggingface_hub import create_repo
from peft import get_peft_model
from transformers import AutoImageProcessor, Trainer, TrainingArguments, set_seed

from .. import AutoModelForPromptClassification, PromptClassificationMixin
from ..data import (
    cache_image_embeds,
    class_names_of,
    hold_out,
    load_image_dataset,
    sample_few_shot,
    sample_few_shot_splits,
    with_pixel_values,
)
from ..data import images as content_hash
from ..data.known_datasets import STYLES, load_style
from ..evaluation.comparison import Answers, Comparison
from ..evaluation.interpret import nearest_words
from ..evaluation.metrics import compute_metrics
from ..evaluation.model_card import CardDetails, TrainingData, is_hub_id
from ..training.callbacks import StopAtNonFinite
from ..training.recipes import Recipe
from ..tuner.files import WEIGHTS_NAME
from .arguments import parse_arguments, plan_runs, use_one_thread_if_tiny
from .resume import explained, find_checkpoint
from .tables import Results, results_table


SHOWN_METRICS = ("accuracy", "mean_class_accuracy")


def main() -> None:
    try:
        model_args, data_args, prompt_args, training_args = parse_arguments()
        set_up_logging(training_args)
        runs = plan_runs(model_args, data_args, training_args)
        with training_args.main_process_first(desc="loading the data"):
            splits, test_sets = load_data(data_args, model_args, training_args)
        draw(splits, data_args, training_args)
        model, image_processor = load_model(model_args, prompt_args, class_names_of(splits["train"]))
        config = prompt_args.config(model)
        model = get_peft_model(model, config).unload()  # complains of a prompt that does not fit
        if training_args.push_to_hub and training_args.process_index == 0:
            create_repository(training_args)
    except (ValueError, OSError) as error:  # what can be wrong with what was asked for
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {error}")

    def embed(dataset: Dataset, name: str) -> Dataset:
        batch_size = training_args.per_device_eval_batch_size
        if config.num_vision_virtual_tokens:  # what an image becomes is learned, too
            return with_pixel_values(dataset, image_processor)
        return cache_image_embeds(
            dataset, model, image_processor, batch_size, description=f"Embedding images ({name})"
        )

    if training_args.process_index == 0:
        announce(model_args, data_args, runs, model.class_names, test_sets)
    use_one_thread_if_tiny(model_args.model_name_or_path)
    model.to(training_args.device)
    with explained(training_args):
        test_sets = {name: embed(dataset, name) for name, dataset in test_sets.items()}
    zero_shot, tuned = {}, []
    for run_args in runs:
        with explained(run_args):
            drawn, validation_set = draw(splits, data_args, run_args)
            if run_args.process_index == 0:
                print(f"Seed {run_args.seed}: {len(drawn)} training images", flush=True)
            if data_args.augment:
                train_set = with_pixel_values(drawn, image_processor, augment=True)
            else:
                train_set = embed(drawn, "train")
            if validation_set is not None:
                validation_set = embed(validation_set, "validation")
            set_seed(run_args.seed)
            model = get_peft_model(model, config)
            recipe = prompt_args.recipe(model, run_args, len(train_set), data_args.shots)
            trainer = tune(model, recipe, run_args, train_set, validation_set, image_processor)
            tuned_answers = ask(trainer.model, test_sets, run_args)
            tuned.append(shown_metrics(tuned_answers))
            if not zero_shot:
                # Not before the training: a model that has been evaluated is not wrapped for several processes any
                # more (accelerate marks it as prepared), and each would train on its own.
                with trainer.model.disable_adapter():
                    answers = ask(trainer.model, test_sets, run_args)
                zero_shot = shown_metrics(answers)
            if run_args.process_index == 0:
                test_name = next(iter(test_sets))
                comparison = Comparison(trainer.model.class_names, answers[test_name], tuned_answers[test_name])
                trainer.model.card_details = describe(trainer, data_args, drawn, test_name, comparison)
            save(trainer, model_args.hub_base_model_id, zero_shot, tuned[-1])
            if len(tuned) < len(runs):
                model = trainer.model.unload()
    if training_args.process_index == 0:
        report(runs, zero_shot, tuned, training_args.output_dir)
        if training_args.push_to_hub:
            push(trainer)


def set_up_logging(training_args: TrainingArguments) -> None:
    level = training_args.get_process_log_level()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    transformers.utils.logging.set_verbosity(level)
    datasets.disable_progress_bars()
    if training_args.process_index != 0 or training_args.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    # peft reads a property of the model that transformers has renamed; nothing that a user can change
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def load_data(data_args, model_args, training_args) -> tuple[DatasetDict, dict[str, Dataset]]:
    """The splits to draw from (`train`, and `validation` if there is one), and the test sets by name."""
    if data_args.is_embedded:
        styles = {style: load_style(style) for style in (data_args.style, *STYLES)}
        splits = DatasetDict(train=styles[data_args.style]["train"])
        test_sets = {style: dataset["test"] for style, dataset in styles.items()}
    else:
        splits = load_image_dataset(
            data_args.dataset_name,
            data_args.dataset_config_name,
            folders=data_args.source("dir"),
            files=data_args.source("file"),
            zhou_split=data_args.zhou_split,
            image_dir=data_args.image_dir,
            webdataset_dir=data_args.webdataset_dir,
            image_column=data_args.image_column_name,
            label_column=data_args.label_column_name,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
        test_sets = choose_test_set(splits, data_args.train_val_split)
    if training_args.eval_strategy != "no" and "validation" not in splits:
        raise ValueError("--eval_strategy needs validation images beside those of the test, and there are none.")
    return splits, test_sets


def choose_test_set(splits: DatasetDict, train_val_split: float) -> dict[str, Dataset]:
    """`test`, otherwise `validation`, otherwise a part of `train`, which is taken out of it."""
    for name in ("test", "validation"):
        if name in splits:
            return {name: splits[name]}
    splits["train"], held_out = hold_out(splits["train"], train_val_split)
    return {"held out of train": held_out}


def draw(splits: DatasetDict, data_args, training_args) -> tuple[Dataset, Dataset | None]:
    """The few training images of a seed, and the validation images if they are asked for."""
    train, validation = splits["train"], splits.get("validation")
    if training_args.eval_strategy == "no":
        validation = None
    if data_args.shots == 0:
        return train, validation
    settings = {"num_shots": data_args.shots, "seed": training_args.seed, "when_fewer": data_args.when_fewer}
    if validation is None:
        return sample_few_shot(train, **settings), None
    return sample_few_shot_splits(train, validation, **settings)


def load_model(model_args, prompt_args, class_names: list[str]) -> tuple[PromptClassificationMixin, object]:
    hub = {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir, "token": model_args.token}
    model = AutoModelForPromptClassification.from_pretrained(
        model_args.model_name_or_path, class_names=class_names, prompt_template=prompt_args.prompt_template, **hub
    )
    return model, AutoImageProcessor.from_pretrained(model_args.model_name_or_path, **hub)


def announce(model_args, data_args, runs: list[TrainingArguments], class_names, test_sets) -> None:
    shots = "all images" if data_args.shots == 0 else f"{data_args.shots} images"
    if data_args.when_fewer == "all" and data_args.shots > 0:
        shots = f"up to {shots}"
    seeds = ", ".join(str(run_args.seed) for run_args in runs)
    tests = ", ".join(f"{name} ({len(dataset)} images)" for name, dataset in test_sets.items())
    first = runs[0]
    print(f"Model      {model_args.model_name_or_path}")
    print(f"Tuned on   {data_args.name}: {shots} of each of {len(class_names)} classes, seed {seeds}")
    print(f"Tested on  {tests}")
    print(f"Running on {first.device.type}, number of processes: {first.world_size}", flush=True)


def create_repository(training_args: TrainingArguments) -> None:
    """Now and not when all is done, so that a missing token or a wrong name is found at once."""
    name = training_args.hub_model_id or os.path.basename(os.path.abspath(training_args.output_dir))
    create_repo(name, token=training_args.hub_token, private=training_args.hub_private_repo, exist_ok=True)


def tune(model, recipe: Recipe, run_args, train_set, validation_set, image_processor) -> Trainer:
    trainer = recipe.trainer_class(
        model=model,
        args=replace(run_args, **recipe.arguments),
        train_dataset=train_set,
        eval_dataset=validation_set,
        compute_metrics=compute_metrics,
        processing_class=image_processor,
        optimizers=recipe.optimizers,
        callbacks=[*recipe.callbacks, StopAtNonFinite()],
    )
    trainer.train(resume_from_checkpoint=find_checkpoint(run_args))
    return trainer


def ask(model, test_sets: dict[str, Dataset], training_args: TrainingArguments) -> dict[str, Answers]:
    """What the model answers about the images of every test set."""
    quiet = {"disable_tqdm": True, "push_to_hub": False}
    # these are about the training, but --dataloader_drop_last would leave out test images, too
    not_training = {"dataloader_drop_last": False, "eval_strategy": "no", "load_best_model_at_end": False}
    trainer = Trainer(model=model, args=replace(training_args, **quiet, **not_training))
    predictions = {name: trainer.predict(dataset) for name, dataset in test_sets.items()}
    return {name: Answers(prediction.predictions, prediction.label_ids) for name, prediction in predictions.items()}


def shown_metrics(answers: dict[str, Answers]) -> Results:
    return {name: {key: of_set.metrics[key] for key in SHOWN_METRICS} for name, of_set in answers.items()}


def evaluate(model, test_sets: dict[str, Dataset], training_args: TrainingArguments) -> Results:
    return shown_metrics(ask(model, test_sets, training_args))


def describe(trainer: Trainer, data_args, drawn: Dataset, test_name: str, comparison: Comparison) -> CardDetails:
    """What the model card says about this training."""
    args = trainer.args
    return CardDetails(
        data=TrainingData(
            name=os.path.basename(os.path.normpath(data_args.name)),
            hub_id=data_args.dataset_name if is_hub_id(data_args.dataset_name) else None,
            num_images=len(drawn),
            shots=data_args.shots or None,
            seed=args.seed,
            content_hash=content_hash(drawn),
        ),
        settings={
            "Epochs": args.num_train_epochs,
            "Batch size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            "Learning rate": args.learning_rate,
            "Augmentation": data_args.augment,
        },
        test_name=test_name,
        comparison=comparison,
        words=nearest_words(trainer.model),
    )


def save(trainer: Trainer, hub_base_model_id: str | None, zero_shot: Results, tuned: Results) -> None:
    """The adapter, with a model card that shows the results, and the image processor, into the output folder."""
    model = trainer.model
    if hub_base_model_id is not None:
        model.active_peft_config.base_model_name_or_path = hub_base_model_id
    model.card_metrics = {
        f"{metric} ({name}), {kind}": value
        for name in tuned
        for kind, results in (("zero-shot", zero_shot), ("tuned", tuned))
        for metric, value in results[name].items()
    }
    if trainer.args.process_index == 0:
        # not trainer.save_model(), which would push, too, and the table is to be seen even where that fails
        model.save_pretrained(trainer.args.output_dir)
        trainer.processing_class.save_pretrained(trainer.args.output_dir)


def report(runs: list[TrainingArguments], zero_shot: Results, tuned: list[Results], output_dir: str) -> None:
    seeds = [run_args.seed for run_args in runs]
    with open(os.path.join(output_dir, "results.json"), "w") as file:
        json.dump({"seeds": seeds, "zero_shot": zero_shot, "tuned": tuned}, file, indent=2)
    spread = f", mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    print(f"\nPercent of images classified correctly{spread}\n\n{results_table(zero_shot, tuned)}\n")
    for run_args in runs:
        size = os.path.getsize(os.path.join(run_args.output_dir, WEIGHTS_NAME))
        print(f"Saved {run_args.output_dir}: {size / 1024:.1f} KB of learned vectors")
    folder = runs[0].output_dir
    print("\nLoad it with\n    from clip_prompt_peft import AutoPeftModelForPromptClassification")
    print(f'    model = AutoPeftModelForPromptClassification.from_pretrained("{folder}")')
    predict = os.path.join(os.path.dirname(sys.argv[0]), "predict.py")
    print(f"or classify images with\n    python {predict} {folder} IMAGE ...")


def push(trainer: Trainer) -> None:
    """By the model's own means, whose card says more than the Trainer's."""
    args, repo_id = trainer.args, trainer.hub_model_id
    trainer.model.push_to_hub(repo_id, token=args.hub_token, private=args.hub_private_repo, revision=args.hub_revision)
    print(f"Pushed to {repo_id}, which loads it in place of the folder")


if __name__ == "__main__":
    main()
