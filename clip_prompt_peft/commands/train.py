"""The command `train`: tunes the prompt of a CLIP on a few images per class, with the Trainer of transformers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import datasets
import transformers
from datasets import Dataset, DatasetDict
from huggingface_hub import create_repo
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from clip_prompt_cli.messages import command_line
from clip_prompt_cli.parsers import check

from .. import AutoModelForPromptClassification, ClassHeadConfig, CLIPPromptTuningConfig
from ..data import (
    cache_image_embeds,
    class_names_of,
    content_hash,
    sample_few_shot,
    sample_few_shot_splits,
    with_pixel_values,
)
from ..evaluation.calibration import TemperatureFit
from ..evaluation.comparison import Answers, Comparison
from ..evaluation.interpret import nearest_words
from ..evaluation.metrics import compute_metrics
from ..evaluation.model_card import CardDetails, TrainingData, is_hub_id
from ..evaluation.tables import counted
from ..peft_model import without_warning_of_renamed_property
from ..training.callbacks import StopAtNonFinite
from ..training.configs import trains_image_tower
from ..training.heads import NUM_VIEWS, fit_class_head
from ..training.recipes import Recipe
from ..tuner import ClassifierAdapterConfig
from ..tuner.files import WEIGHTS_NAME
from ..tuner.hub import load_image_processor
from .arguments import parse_arguments, parser
from .calibrating import calibrate, check_has_place, images_to_calibrate
from .checks import check_runs, check_shots, check_training, rehearse
from .common import (
    COLUMNS,
    Results,
    errors_in_one_line,
    progress_bars_of_datasets,
    results_table,
    silence_libraries,
    stopped_in_one_line,
    use_one_thread_if_tiny,
)
from .data import load_data, warn_of_shared_images
from .outputs import (
    check_can_be_written,
    check_nothing_is_replaced,
    no_empty_folders,
    record_of,
    remove_earlier,
    run_of,
    runs_in,
    write_record,
)
from .resume import find_checkpoint, hint_at_checkpoint, what_is_done
from .teacher import check_teacher, load_teacher


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = check("train", arguments)
    runs: list[TrainingArguments] = []
    with stopped_in_one_line(lambda: what_is_done(runs)):
        train(arguments, runs)


def train(arguments: list[str], runs: list[TrainingArguments]) -> None:
    """Does everything; the arguments of every seed are added to `runs`."""
    with errors_in_one_line(parser().flags):
        model_args, data_args, prompt_args, training_args, given = parse_arguments(arguments)
        set_up_logging(training_args)
        check_training(training_args)
        check_runs(model_args, data_args, training_args)
        check_teacher(prompt_args.method, prompt_args.teacher)
        is_main_process = training_args.process_index == 0
        output_dir = training_args.output_dir
        record = record_of(model_args, data_args, prompt_args, training_args, given)
        check_nothing_is_replaced(output_dir, record, training_args)
        planned = runs_in(output_dir, training_args, data_args.num_seeds)
        if not training_args.overwrite_output_dir:
            for run_args in planned:
                find_checkpoint(run_args)
        if is_main_process:
            check_can_be_written(planned[0].output_dir)
        shows_bars = is_main_process and not training_args.disable_tqdm
        with (
            training_args.main_process_first(desc="loading the data"),
            progress_bars_of_datasets(shows_bars and not data_args.is_embedded),
        ):
            splits, test_sets = load_data(data_args, model_args.cache_dir, model_args.token)
        if training_args.eval_strategy != "no" and "validation" not in splits:
            raise ValueError("--eval_strategy needs validation images besides the test images, and there are none.")
        validation = splits.get("validation") if training_args.eval_strategy != "no" else None
        to_calibrate = images_to_calibrate(data_args.calibrate, splits, test_sets)
        check_shots(splits["train"], validation, test_sets, data_args)
        if is_main_process and not data_args.is_embedded:
            warn_of_shared_images(splits["train"], test_sets)
            if (used := to_calibrate if validation is None else validation) is not None:
                warn_of_shared_images(splits["train"], {"validation": used})
                warn_of_shared_images(used, test_sets, "validation")
        drawn, _ = draw(splits, data_args, training_args)
        name = model_args.model_name_or_path
        hub = {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir, "token": model_args.token}
        class_names = class_names_of(splits["train"])
        model = AutoModelForPromptClassification.from_pretrained(
            name, class_names=class_names, prompt_template=prompt_args.prompt_template, **hub
        )
        image_processor = load_image_processor(model)
        teacher = None
        if prompt_args.teacher is not None:
            hub.pop("revision")
            teacher = load_teacher(prompt_args.teacher, class_names, prompt_args.prompt_template, **hub)
        config = prompt_args.config(model, **({} if teacher is None else {"projection_dim": teacher.width}))
        if to_calibrate is not None:
            check_has_place(config)
        use_one_thread_if_tiny(name)
        with without_warning_of_renamed_property():
            peft_model = get_peft_model(model, config)  # raises if the prompt does not fit
        recipe = prompt_args.recipe(peft_model, planned[0], len(drawn), data_args.shots, given)
        unread = with_pixel_values(drawn, image_processor, augment=data_args.augment)
        of_teacher = {} if teacher is None else {"teacher": teacher.model}
        make = partial(make_trainer, peft_model, unread, validation, image_processor, **of_teacher)
        rehearse(make, recipe, planned[0], config)
        model = peft_model.unload()
        if training_args.push_to_hub and is_main_process:
            create_repository(planned[0])
        if training_args.overwrite_output_dir and is_main_process:
            remove_earlier(output_dir)
        test_name, test_set = next(iter(test_sets.items()))
        record["test"] = {"name": test_name, "num_images": len(test_set), "content_hash": content_hash(test_set)}

    def embed(dataset: Dataset, description: str, num_views: int | None = None) -> Dataset:
        if trains_image_tower(config):
            return with_pixel_values(dataset, image_processor)
        batch_size = training_args.per_device_eval_batch_size
        description = f"Embedding images ({description})"
        settings = {"description": description, "num_workers": training_args.dataloader_num_workers}
        settings |= {} if num_views is None else {"num_views": num_views}
        with progress_bars_of_datasets(shows_bars):
            return cache_image_embeds(dataset, model, image_processor, batch_size, **settings)

    runs += planned
    if is_main_process:
        announce(name, data_args, runs, class_names, test_sets, prompt_args.teacher)
    model.to(training_args.device)
    if teacher is not None:
        teacher.model.to(training_args.device)
    with hint_at_checkpoint(runs[0]):
        test_sets = {name: embed(dataset, name) for name, dataset in test_sets.items()}
        to_calibrate = None if to_calibrate is None else embed(to_calibrate, "validation")
    zero_shot, tuned = {}, []
    for run_args in runs:
        with hint_at_checkpoint(run_args), no_empty_folders(output_dir):
            drawn, validation_set = draw(splits, data_args, run_args)
            if is_main_process:
                print(f"Seed {run_args.seed}: {counted(len(drawn), 'training image')}", flush=True)
            num_views = NUM_VIEWS.get(prompt_args.method) if data_args.augment else None
            if teacher is not None:
                train_set = teacher.training_images(drawn, image_processor, data_args.augment)
            elif data_args.augment and num_views is None:
                train_set = with_pixel_values(drawn, image_processor, augment=True)
            else:
                train_set = embed(drawn, "train", num_views)
            if validation_set is not None:
                validation_set = embed(validation_set, "validation")
            set_seed(run_args.seed)
            with without_warning_of_renamed_property():
                model = get_peft_model(model, config)
            if isinstance(config, ClassHeadConfig) and not trains_image_tower(config):
                with errors_in_one_line():
                    fit_class_head(model, train_set)
            recipe = prompt_args.recipe(model, run_args, len(train_set), data_args.shots, given)
            trainer = make_trainer(model, train_set, validation_set, image_processor, run_args, recipe, **of_teacher)
            trainer.train(resume_from_checkpoint=find_checkpoint(run_args))
            calibration = None
            if to_calibrate is not None:
                validation_answers = classify(trainer.model, {"validation": to_calibrate}, run_args)["validation"]
                calibration = calibrate(trainer.model, validation_answers, run_args.seed, is_main_process)
            tuned_answers = classify(trainer.model, test_sets, run_args)
            tuned.append(shown_metrics(tuned_answers))
            if not zero_shot:
                # Only after the training: accelerate marks an evaluated model as prepared and does not wrap it for
                # several processes any more, so each of them would train on its own.
                with trainer.model.disable_adapter():
                    answers = classify(trainer.model, test_sets, run_args)
                zero_shot = shown_metrics(answers)
            if is_main_process:
                temperature = None if calibration is None else calibration.temperature
                both = answers[test_name], tuned_answers[test_name]
                comparison = Comparison(trainer.model.class_names, *both, temperature)
                trainer.model.card_details = describe(trainer, data_args, drawn, test_name, comparison, calibration)
                write_record(run_args.output_dir, {**record, "run": run_of(trainer.args)})
            others = [name for name in test_sets if name != test_name]  # the card compares in detail on the first one
            save(trainer, model_args.hub_base_model_id, zero_shot, tuned[-1], others)
            if len(tuned) < len(runs):
                model = trainer.model.unload()
    if is_main_process:
        report(runs, zero_shot, tuned, output_dir, trainer.model)
        if training_args.push_to_hub:
            push(trainer)


def set_up_logging(training_args: TrainingArguments) -> None:
    level = training_args.get_process_log_level()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    transformers.utils.logging.set_verbosity(level)
    datasets.disable_progress_bars()
    silence_libraries(progress_bars=training_args.process_index == 0 and not training_args.disable_tqdm)


def draw(splits: DatasetDict, data_args, training_args) -> tuple[Dataset, Dataset | None]:
    """Returns the training images of a seed, and the validation images if there is an evaluation during training."""
    train, validation = splits["train"], splits.get("validation")
    if training_args.eval_strategy == "no":
        validation = None
    if data_args.shots == 0:
        return train, validation
    settings = {"num_shots": data_args.shots, "seed": training_args.seed, "when_fewer": data_args.when_fewer}
    if validation is None:
        return sample_few_shot(train, **settings), None
    return sample_few_shot_splits(train, validation, **settings)


def announce(
    model_name: str, data_args, runs: list[TrainingArguments], class_names, test_sets, teacher: str | None
) -> None:
    shots = counted(data_args.shots, "image") if data_args.shots else "all images"
    if data_args.shots and data_args.when_fewer == "all":
        shots = f"up to {shots}"
    seeds = f"seed{'s' if len(runs) > 1 else ''} " + ", ".join(str(run_args.seed) for run_args in runs)
    tests = ", ".join(f"{name} ({counted(len(dataset), 'image')})" for name, dataset in test_sets.items())
    print(f"Model      {model_name}")
    if teacher is not None:
        print(f"Teacher    {teacher}, from whose answers it learns instead of labels")
    print(f"Tuned on   {data_args.name}: {shots} of each of {counted(len(class_names), 'class')}, {seeds}")
    print(f"Tested on  {tests}")
    print(f"Running on {runs[0].device.type}, number of processes: {runs[0].world_size}", flush=True)


def create_repository(training_args: TrainingArguments) -> None:
    """Creates the repository before the training, so that a missing token or a wrong name is noticed at once."""
    name, token = training_args.hub_model_id, training_args.hub_token
    create_repo(name, token=token, private=training_args.hub_private_repo, exist_ok=True)


def make_trainer(
    model, train_set, validation_set, image_processor, run_args: TrainingArguments, recipe: Recipe, **further
) -> Trainer:
    return recipe.trainer_class(
        model=model,
        args=replace(run_args, **recipe.arguments),
        train_dataset=train_set,
        eval_dataset=validation_set,
        compute_metrics=compute_metrics,
        processing_class=image_processor,
        optimizers=recipe.optimizers,
        callbacks=[*recipe.callbacks, StopAtNonFinite()],
        **further,
    )


def classify(model, test_sets: dict[str, Dataset], training_args: TrainingArguments) -> dict[str, Answers]:
    """Returns the model's answers to the images of every test set."""
    are_embedded = all("image_embeds" in dataset.column_names for dataset in test_sets.values())
    args = replace(
        training_args,
        disable_tqdm=training_args.disable_tqdm or are_embedded,  # without the image tower, it takes no time
        push_to_hub=False,
        dataloader_drop_last=False,  # True would drop test images
        eval_strategy="no",
        load_best_model_at_end=False,
    )
    trainer = Trainer(model=model, args=args)
    predictions = {name: trainer.predict(dataset) for name, dataset in test_sets.items()}
    return {name: Answers(prediction.predictions, prediction.label_ids) for name, prediction in predictions.items()}


def shown_metrics(answers: dict[str, Answers]) -> Results:
    return {name: {metric: of_set.metrics[metric] for metric in COLUMNS} for name, of_set in answers.items()}


def describe(
    trainer: Trainer,
    data_args,
    drawn: Dataset,
    test_name: str,
    comparison: Comparison,
    calibration: TemperatureFit | None,
) -> CardDetails:
    """Returns the training's part of the model card."""
    args = trainer.args
    return CardDetails(
        data=TrainingData(
            name=data_args.short_name,
            hub_id=data_args.dataset_name if is_hub_id(data_args.dataset_name) else None,
            num_images=len(drawn),
            shots=data_args.shots or None,
            seed=args.seed,
            content_hash=content_hash(drawn),
        ),
        settings={
            "Epochs": f"{args.num_train_epochs:g}",
            "Batch size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            "Learning rate": args.learning_rate,
            "Augmentation": data_args.augment,
        },
        test_name=test_name,
        comparison=comparison,
        words=nearest_words(trainer.model) if learns_prompts(trainer.model) else (),
        calibration=calibration,
    )


def learns_prompts(model) -> bool:
    """Returns whether the adapter is of prompts, and not of a method that peft has itself."""
    return isinstance(model.active_peft_config, CLIPPromptTuningConfig)


def save(
    trainer: Trainer, hub_base_model_id: str | None, zero_shot: Results, tuned: Results, names: Sequence[str]
) -> None:
    """Saves the adapter, with the results on the named test sets in its model card, and the image processor."""
    model = trainer.model
    if hub_base_model_id is not None:
        config = model.active_peft_config
        if hub_base_model_id != config.base_model_name_or_path:
            config.revision = config.base_model_subfolder = None  # of the model that was loaded
        config.base_model_name_or_path = hub_base_model_id
    model.card_metrics = {
        f"{metric} ({name}), {kind}": value
        for name in names
        for kind, results in (("zero-shot", zero_shot), ("tuned", tuned))
        for metric, value in results[name].items()
    }
    if trainer.args.process_index == 0:
        # not trainer.save_model(), which would push, too: the table must be printed even if that fails
        model.save_pretrained(trainer.args.output_dir)
        trainer.processing_class.save_pretrained(trainer.args.output_dir)


def report(runs: list[TrainingArguments], zero_shot: Results, tuned: list[Results], output_dir: str, model) -> None:
    seeds = [run_args.seed for run_args in runs]
    with open(os.path.join(output_dir, "results.json"), "w") as file:
        json.dump({"seeds": seeds, "zero_shot": zero_shot, "tuned": tuned}, file, indent=2)
    spread = f", mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    print(f"\nPercent of images classified correctly{spread}\n\n{results_table(zero_shot, tuned)}\n")
    config = model.active_peft_config
    kind = "learned vectors" if learns_prompts(model) else f"{config.peft_type.value} of peft"
    if isinstance(config, ClassHeadConfig):
        kind = "a class head" + ("" if config.target_modules is None else " and tuned LayerNorms")
    for run_args in runs:
        size = os.path.getsize(os.path.join(run_args.output_dir, WEIGHTS_NAME))
        print(f"Saved {run_args.output_dir}: {size / 1024:.1f} KB of {kind}")
    folder = runs[0].output_dir
    if not isinstance(config, ClassifierAdapterConfig):
        print("\nIt holds neither class names nor a template. Load it with")
        print("    from clip_prompt_peft import AutoModelForPromptClassification")
        print("    model = AutoModelForPromptClassification.from_pretrained(")
        print(f"        {folder!r},")
        print(f"        class_names={model.class_names},")
        print(f"        prompt_template={model.prompt_template!r},")
        print("    )")
        return
    print("\nLoad it with\n    from clip_prompt_peft import AutoPeftModelForPromptClassification")
    print(f'    model = AutoPeftModelForPromptClassification.from_pretrained("{folder}")')
    print(f"or classify images with\n    {command_line('predict', folder, 'IMAGE ...')}")


def push(trainer: Trainer) -> None:
    """Pushes with the model's own method, whose model card says more than the Trainer's."""
    args, repo_id = trainer.args, trainer.hub_model_id
    trainer.model.push_to_hub(repo_id, token=args.hub_token, private=args.hub_private_repo, revision=args.hub_revision)
    print(f"Pushed to {repo_id}, which loads it in place of the folder")


if __name__ == "__main__":
    main()
