"""What runs in a process of its own in test_hub.py, with HF_ENDPOINT set to the stand-in of the Hub.

    hub_client.py FOLDER TASK ...

A task is one of the functions below, and leaves in FOLDER what the tests look at.
"""

import copy
import json
import logging
import os
import pickle
import shutil
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from urllib.request import urlopen

import torch
import transformers
from adapters import as_if_trained, change_config, fitted, tuned, vectors_of
from datasets import Dataset
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Trainer, TrainingArguments, pipeline

from clip_prompt_peft import (
    AutoModelForPromptClassification,
    AutoPeftModelForPromptClassification,
    CLIPForPromptClassification,
    build_class_prompts,
    method_config,
)
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.commands.adapters import base_model_of
from clip_prompt_peft.data import load_image_dataset
from clip_prompt_peft.tuner.hub import load_image_processor


BASE = "clips/tiny-clip"  # on the stand-in
CLASS_NAMES = ["cat", "dog", "red_car"]
METHODS = {
    "tcp": {},
    "promptkd": {"projection_dim": 24},
    "2sfs": {"starts_later": False},
    "clap": {},
    "tip-adapter": {},
}
PIXEL_VALUES = torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def new_model(base):
    classifier = CLIPForPromptClassification.from_pretrained(base, class_names=CLASS_NAMES)
    return tuned(classifier, num_virtual_tokens=5)


def new_trainer(model, output_dir, repo_id):
    data = Dataset.from_dict({"pixel_values": PIXEL_VALUES.numpy(), "labels": [0, 1, 2, 0, 1, 2]}).with_format("torch")
    args = TrainingArguments(str(output_dir), max_steps=2, hub_model_id=repo_id, use_cpu=True, save_strategy="no")
    return Trainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


@torch.no_grad()
def classifier_logits(model):
    return model.eval()(pixel_values=PIXEL_VALUES).logits


@torch.no_grad()
def clip_logits(model, repo_id):
    """Of a plain CLIPModel, with the texts that the adapter asks for."""
    config = PeftConfig.from_pretrained(repo_id)
    prompts = build_class_prompts(
        config.class_names, config.padded_template, AutoTokenizer.from_pretrained(BASE), max_length=77
    )
    output = model.eval()(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, pixel_values=PIXEL_VALUES
    )
    return output.logits_per_image


def push(folder):
    """Trains and pushes, by the Trainer and by the model, over a base model of the Hub."""
    model = new_model(BASE)
    trainer = new_trainer(model, folder / "run", "by-trainer")
    trainer.train()
    metrics = trainer.evaluate()
    model.hub_repo_id = "me/by-trainer"
    trainer.push_to_hub()
    model.card_metrics = {"accuracy": metrics["eval_accuracy"]}
    model.push_to_hub("by-model", tags=["pets"])
    model.push_to_hub("me/with-card", revision="preview")
    model.push_to_hub("me/with-card")
    save_file({"logits": classifier_logits(model)}, folder / "pushed.safetensors")


def push_methods(folder):
    """Pushes an adapter of each method that is more than prompts."""
    logits = {}
    for name, fields in METHODS.items():
        classifier = CLIPForPromptClassification.from_pretrained(BASE, class_names=CLASS_NAMES)
        model = as_if_trained(fitted(get_peft_model(classifier, method_config(name, classifier, **fields))))
        model.push_to_hub(f"me/{name}")
        logits[name] = classifier_logits(model)
    save_file(logits, folder / "pushed_methods.safetensors")


def load_methods(folder):
    """Loads what `push_methods` pushed."""
    loaded = {name: AutoPeftModelForPromptClassification.from_pretrained(f"me/{name}") for name in METHODS}
    save_file({name: classifier_logits(model) for name, model in loaded.items()}, folder / "methods.safetensors")


def load_datasets(folder):
    """Loads the data sets that are named in a file, and notes the class names of each or why it was refused."""
    noted = {}
    for name, settings in json.loads((folder / "datasets.json").read_text()):
        try:
            found = [split.features["label"].names for split in load_image_dataset(name, **settings).values()]
        except (OSError, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
        noted.setdefault(name, []).append(found)
    (folder / "noted.json").write_text(json.dumps(noted))


def push_with_local_base(folder):
    """The same over a folder, with what is logged meanwhile."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("clip_prompt_peft").addHandler(handler)
    logged = {}
    model = new_model(TINY_CLIP)
    model.save_pretrained(folder / "saved")
    logged["save"] = list(messages)
    messages.clear()
    model.push_to_hub("me/local-by-model")
    logged["model"] = list(messages)
    messages.clear()
    new_trainer(model, folder / "local_run", "me/local-by-trainer").push_to_hub()
    logged["trainer"] = list(messages)
    messages.clear()
    model.active_peft_config.base_model_name_or_path = BASE
    model.push_to_hub("me/local-corrected")
    logged["corrected"] = list(messages)
    (folder / "logged.json").write_text(json.dumps(logged))


def push_classifier(folder):
    """The classifier itself, in both ways, and what a pipeline needs beside it."""
    classifier = CLIPForPromptClassification.from_pretrained(BASE, class_names=CLASS_NAMES)
    classifier.push_to_hub("me/classifier")
    AutoImageProcessor.from_pretrained(BASE).push_to_hub("me/classifier")
    classifier.save_pretrained(folder / "classifier", push_to_hub=True, repo_id="me/saved-and-pushed")


def classify_by_pipeline(folder):
    """The answers of pipelines for an adapter and a classifier on the Hub, and what the models themselves say."""
    image = Image.new("RGB", (60, 50), "red")
    inputs = AutoImageProcessor.from_pretrained(BASE)(image, return_tensors="pt")
    answers = {}
    for name, auto_class in (
        ("me/by-trainer", AutoPeftModelForPromptClassification),
        ("me/classifier", CLIPForPromptClassification),
    ):
        with torch.no_grad():
            scores = auto_class.from_pretrained(name).eval()(**inputs).logits.softmax(-1)[0]
        answers[name] = {
            "expected": dict(zip(CLASS_NAMES, scores.tolist())),
            "our task": pipeline("prompt-image-classification", model=name)(image),
        }
    answers["me/classifier"]["code of the repository"] = pipeline(model="me/classifier", trust_remote_code=True)(image)
    (folder / "answers.json").write_text(json.dumps(answers))


def load(folder):
    """Loads in the three ways, each from a repository pushed in another way."""
    logits = {
        "auto": classifier_logits(AutoPeftModelForPromptClassification.from_pretrained("me/by-trainer")),
        "auto_from_push_by_model": classifier_logits(
            AutoPeftModelForPromptClassification.from_pretrained("me/by-model")
        ),
        "classifier": classifier_logits(CLIPForPromptClassification.from_pretrained("me/by-trainer")),
    }
    peft_model = PeftModel.from_pretrained(CLIPModel.from_pretrained(BASE), "me/by-trainer")
    logits["peft_model"] = clip_logits(peft_model, "me/by-trainer")
    clip = CLIPModel.from_pretrained(BASE)
    clip.load_adapter("me/by-trainer")
    logits["load_adapter"] = clip_logits(clip, "me/by-trainer")
    save_file({way: tensor.contiguous() for way, tensor in logits.items()}, folder / "loaded.safetensors")


def outcome(action):
    try:
        action()
    except Exception as error:
        return {"type": type(error).__name__, "is_os_error": isinstance(error, OSError), "message": str(error)}
    return None


def fail_to_push(folder):
    model = new_model(TINY_CLIP)
    model.active_peft_config.base_model_name_or_path = BASE
    model.save_pretrained(folder / "before")
    pushes = {
        "refused": lambda: model.push_to_hub("me/push-refused"),
        "breaks_down": lambda: model.push_to_hub("me/push-breaks-down"),
        "breaks_down_under_trainer": new_trainer(model, folder / "failed_run", "me/push-breaks-down").push_to_hub,
    }
    (folder / "push_outcomes.json").write_text(json.dumps({name: outcome(action) for name, action in pushes.items()}))
    model.save_pretrained(folder / "after")


def fail_to_load(folder):
    def load(name):
        return AutoPeftModelForPromptClassification.from_pretrained(f"me/{name}")

    names = ["no-access", "nowhere", "breaks-down", "breaks-off", "pickled", "by-trainer"]
    outcomes = {name: outcome(lambda name=name: load(name)) for name in names}
    (folder / "load_outcomes.json").write_text(json.dumps(outcomes))
    urlopen(os.environ["HF_ENDPOINT"] + "/heal")
    save_file({"logits": classifier_logits(load("breaks-off"))}, folder / "recovered.safetensors")


def lied_to(folder):
    """Loads what the tests have prepared, in two ways, and notes what came of it."""
    names = sorted(json.loads((folder / "repositories.json").read_text()))
    model_classes = {"auto": AutoPeftModelForPromptClassification, "classifier": CLIPForPromptClassification}
    outcomes = {}
    for name in names:
        for way, model_class in model_classes.items():
            if (name, way) == ("slow", "classifier"):
                continue  # both wait in the same place

            def load_and_run(name=name, model_class=model_class):
                assert classifier_logits(model_class.from_pretrained(f"me/{name}")).isfinite().all()

            outcomes[f"{name} {way}"] = outcome(load_and_run)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def settings(folder):
    """A private base model with a token, a revision, a cache and a subfolder, and an adapter on it."""
    secret, cache = "hf_secret", folder / "cache"
    (folder / "disk").mkdir()
    cache.symlink_to(folder / "disk")
    os.environ.pop("HF_TOKEN", None)
    logged = StringIO()
    logging.basicConfig(stream=logged, level=logging.DEBUG, force=True)
    transformers.logging.set_verbosity_debug()
    transformers.logging.enable_propagation()
    where = {"token": secret, "cache_dir": str(cache)}
    noted = {}
    noted["without a token"] = outcome(lambda: AutoModelForPromptClassification.from_pretrained("me/private"))
    model = AutoModelForPromptClassification.from_pretrained(
        "me/private", revision="v2", class_names=CLASS_NAMES, **where
    )
    noted["commit"] = model.hub_settings.revision
    plain = CLIPModel.from_pretrained("me/private", revision="v2", **where)
    noted["plain model"] = outcome(lambda: tuned(plain))
    again = CLIPForPromptClassification.from_base(plain, revision="v2", class_names=CLASS_NAMES, **where)
    noted["copies"] = [
        other.hub_settings == model.hub_settings
        for other in (copy.deepcopy(model), type(model).from_base(model.to_base(), class_names=CLASS_NAMES))
    ]
    model.save_pretrained(folder / "classifier")
    peft_model = tuned(model, num_virtual_tokens=5)
    peft_model.save_pretrained(folder / "adapter")
    torch.save(model, folder / "model.pt")
    noted["repr"] = secret in repr(model.hub_settings) + repr(model) + repr(model.config)
    files = [path for path in folder.rglob("*") if path.is_file()]
    noted["files with the token"] = [path.name for path in files if secret.encode() in path.read_bytes()]
    noted["config"] = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    expected = classifier_logits(peft_model)
    loads = {
        "auto": lambda **more: AutoPeftModelForPromptClassification.from_pretrained(
            folder / "adapter", **where, **more
        ),
        "classifier": lambda **more: CLIPForPromptClassification.from_pretrained(folder / "adapter", **where, **more),
        "offline": lambda: loads["auto"](local_files_only=True),
    }
    logits = {way: classifier_logits(load()) for way, load in loads.items()}
    noted["loaded"] = {way: torch.allclose(found, expected, atol=1e-5) for way, found in logits.items()}
    sub = AutoModelForPromptClassification.from_pretrained("me/private", subfolder="sub", class_names=["cat"], **where)
    of_sub = tuned(sub, num_virtual_tokens=5)
    of_sub.save_pretrained(folder / "of_sub")
    loaded = AutoPeftModelForPromptClassification.from_pretrained(folder / "of_sub", **where)
    noted["subfolder"] = torch.allclose(classifier_logits(loaded), classifier_logits(of_sub), atol=1e-5)
    noted["from_base"] = again.hub_settings.revision
    with_no_token = {**where, "token": False}
    noted["token=False"] = outcome(
        lambda: AutoModelForPromptClassification.from_pretrained("me/private", **with_no_token)
    )
    os.environ["HF_TOKEN"] = secret
    noted["token=False beside one of the environment"] = outcome(
        lambda: AutoModelForPromptClassification.from_pretrained("me/private", **with_no_token)
    )
    open_one = AutoModelForPromptClassification.from_pretrained(
        "me/open", token=False, class_names=CLASS_NAMES, cache_dir=str(cache)
    )
    auto = AutoPeftModelForPromptClassification.from_pretrained
    tuned(open_one).save_pretrained(folder / "open")
    auto(folder / "open", token=False, cache_dir=str(cache))
    load_image_processor(open_one)
    noted["pickle"] = secret.encode() in pickle.dumps(model.hub_settings) + pickle.dumps(copy.copy(model))
    noted["errors"] = [name for name, value in noted.items() if secret in json.dumps(value)]
    noted["logged"] = [len(logged.getvalue()) > 1000, secret in logged.getvalue()]
    (folder / "noted.json").write_text(json.dumps(noted))


def printed(command, *arguments):
    """What a command of the package says, its exit included."""
    sys.argv = [command, *map(str, arguments)]
    said = StringIO()
    with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said):
        warnings.simplefilter("always")
        try:
            import_module(f"clip_prompt_peft.commands.{command}").main()
        except SystemExit as exit:
            print(exit.code)
    return said.getvalue()


def upload(folder, repo_id, path_in_repo=None, **fields):
    """Uploads an adapter, with other values in its configuration."""
    folder = Path(shutil.copytree(folder, folder.parent / repo_id.replace("/", "-")))
    change_config(folder, **fields)
    HfApi().create_repo(repo_id, exist_ok=True)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder, path_in_repo=path_in_repo)


def base_that_moves(folder):
    """Adapters of a base model whose branch main changes after the training, loaded in every way."""
    adapter, fresh = folder / "adapter", str(folder / "fresh")
    auto = AutoPeftModelForPromptClassification.from_pretrained
    model = new_model("me/moving")
    model.save_pretrained(adapter)
    model.push_to_hub("me/of-moving")
    expected = {"main": classifier_logits(model)}
    with torch.no_grad():
        vectors_of(model).neg_()
    model.push_to_hub("me/of-moving", revision="v2")
    expected["v2"] = classifier_logits(model)
    upload(adapter, "me/seeds", "seed1")
    upload(adapter, "me/lost", revision="dead" * 10)
    upload(adapter, "me/of-gone", base_model_name_or_path="me/gone")
    Image.new("RGB", (60, 50), "red").save(folder / "red.png")
    predict = ("predict", adapter, folder / "red.png", "--top_k", 3)
    said = {"before": printed(*predict)}
    urlopen(os.environ["HF_ENDPOINT"] + "/move")
    said |= {"after": printed(*predict), "of main": printed(*predict, "--base_revision", "main")}
    said["by id"] = printed("predict", "me/of-moving", *predict[2:])
    loads = {
        "auto": lambda: auto(adapter, cache_dir=fresh),
        "auto, Hub": lambda: auto("me/of-moving", cache_dir=fresh),
        "classifier": lambda: CLIPForPromptClassification.from_pretrained("me/of-moving", cache_dir=fresh),
        "subfolder": lambda: auto("me/seeds", subfolder="seed1"),
        "base named": lambda: auto(adapter, base_model_name_or_path="me/moving"),
        "v2": lambda: auto("me/of-moving", revision="v2"),
    }
    equal = {}
    for way, load in loads.items():
        wanted = expected["v2" if way == "v2" else "main"]
        equal[way] = torch.allclose(classifier_logits(load()), wanted, atol=1e-5)
    others = {
        "revision": lambda: auto(adapter, base_model_revision="main"),
        "base": lambda: auto(adapter, base_model_name_or_path="me/other"),
        "peft": lambda: PeftModel.from_pretrained(CLIPModel.from_pretrained("me/other"), adapter),
        "lost": lambda: auto("me/lost", base_model_revision="main"),
    }
    warned = {}
    for way, load in others.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load()
        warned[way] = [str(warning.message) for warning in caught if "was trained on" in str(warning.message)]
    failed = {
        "auto": outcome(lambda: auto("me/lost")),
        "classifier": outcome(lambda: CLIPForPromptClassification.from_pretrained("me/lost")),
        "demo": outcome(lambda: base_model_of({"lost": "me/lost"})),
        "gone": outcome(lambda: auto("me/of-gone")),
        "folder": outcome(lambda: auto("me/seeds")),
    }
    said["lost"] = printed("predict", "me/lost", folder / "red.png")
    noted = {"said": said, "equal": equal, "warned": warned, "failed": failed}
    (folder / "noted.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    for task in sys.argv[2:]:
        globals()[task](Path(sys.argv[1]))
