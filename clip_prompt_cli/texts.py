"""What the help of each command says, and which of its arguments it shows first."""

SUMMARIES = {
    "train": """\
Tunes the prompt of a CLIP on a few images per class, with the Trainer of transformers. Without arguments, it tunes the
embedded tiny CLIP on the embedded pictures with three seeds. Adapters are saved to --output_dir: seed1, seed2, ...""",
    "predict": """\
Classifies image files with a tuned prompt. A folder stands for the images in it and in its sub-folders. Files that
cannot be read are listed at the end, and the exit code is then 1; all other files are classified nevertheless.""",
    "report": """\
Writes what an adapter learned, and how accurate it is, into one HTML file. It tests on the test images of the command
`train` that made the adapter. Other images are named by the same arguments as there; for an adapter of another origin,
such as the Hub, they have to be.""",
    "benchmark": """\
Compares methods in the protocols of the field, and writes tables and figures. Without arguments, it runs on the
embedded pictures: 1 to 16 shots with three seeds, base and new classes, and two other styles as unseen domains. An
interrupted benchmark continues where it stopped; a finished one is only drawn. Methods are trained on the first of
--data and tested on all. If the others have other classes, that is the cross-data-set protocol.""",
    "export": """\
Writes a tuned classifier as ONNX, with the embeddings of its classes, and says how its answers compare with the
model's. The files need neither PyTorch nor this library. Needs the packages of the extra `export`.""",
    "serve": """\
Classifies images over HTTP with any number of adapters on one frozen CLIP. Adapters that are there at the start are
loaded. `curl -X PUT http://127.0.0.1:8000/adapters/NAME` loads one that comes later, and `-X DELETE` unloads one.
There is no authentication, and by default the service listens on this machine only. Needs the packages of the extra
`serve`.""",
    "demo": """\
Shows zero-shot and tuned CLIP side by side in the browser, for an image and class names that can be edited. Without
arguments, it first tunes on the embedded pictures, which takes a minute. Needs the packages of the extra `demo`.""",
    "convert": """\
Converts a checkpoint of the original authors' code to an adapter. The code of CoOp, CoCoOp, KgCoOp, ProGrad, MaPLe,
IVLP, VPT (in MaPLe's repository) and PromptSRC saves a pickle `model.pth.tar-N`: the `state_dict` of the prompt
learner or of the whole model, with epoch, optimizer and scheduler. That of CLIP-LoRA saves `lora_weights.pt`, which
becomes a LoRA of peft.""",
    "convert-open-clip": """\
Writes a checkpoint of open_clip as a folder in the format of transformers: model, tokenizer and image processor.
open_clip is not needed. Other commands take open_clip's checkpoints as they are; the folder is for other programs.""",
}

USAGES = {
    "train": "[SETTINGS.yaml] [--train_dir FOLDER] [--NAME VALUE ...]",
    "predict": "ADAPTER IMAGE [IMAGE ...] [--top_k NUMBER] [--coverage SHARE]",
    "report": "ADAPTER [--output FILE] [--NAME VALUE ...]",
    "benchmark": "[--data NAME=SOURCE ...] [--NAME VALUE ...]",
    "export": "ADAPTER OUT [--test_dir FOLDER] [--int8]",
    "serve": "[ADAPTERS] [--port NUMBER]",
    "demo": "[ADAPTERS] [--port NUMBER]",
    "convert": "CHECKPOINT OUT --base_model_name_or_path MODEL [--class_names NAME ...]",
    "convert-open-clip": "NAME OUT [--model_revision REVISION]",
}

EXAMPLES = {
    "train": (
        "clip-prompt train --train_dir pets/train --test_dir pets/test --output_dir outputs/pets",
        "clip-prompt train --dataset_name user/pets --shots 4 --method maple --push_to_hub",
        "clip-prompt train settings.yaml --seed 2        # a YAML or JSON file of arguments, before others",
        "accelerate launch -m clip_prompt_peft.commands.train --train_dir pets --augment       # several processes",
    ),
    "predict": (
        "clip-prompt predict outputs/pets cat.jpg pictures/",
        "clip-prompt predict user/pets-prompts cat.jpg --top_k 5",
        "clip-prompt predict outputs/pets cat.jpg --coverage 0.9",
        "clip-prompt predict outputs/pets pictures/ --test_time tpt",
    ),
    "report": (
        "clip-prompt report outputs/pets",
        "clip-prompt report outputs/pets/seed2 --test_dir other/pictures",
        "clip-prompt report user/pets-prompts --dataset_name timm/oxford-iiit-pet --output pets.html",
    ),
    "benchmark": (
        "clip-prompt benchmark --methods zero-shot ensemble prompt-tuning --shots 1 16",
        "clip-prompt benchmark --model_name_or_path openai/clip-vit-base-patch16 \\",
        "    --data pets=timm/oxford-iiit-pet food=ethz/food101 --when_fewer error",
    ),
    "export": (
        "clip-prompt export outputs/pets pets-onnx",
        "clip-prompt export user/pets-prompts pets-onnx --test_dir pets/test --int8",
    ),
    "serve": (
        "clip-prompt serve outputs/pets",
        "curl -F images=@cat.jpg -F adapters=seed1 http://127.0.0.1:8000/classify",
    ),
    "demo": ("clip-prompt demo", "clip-prompt demo outputs/pets"),
    "convert": (
        "clip-prompt convert model.pth.tar-5 maple-caltech --base_model_name_or_path openai/clip-vit-base-patch16 \\",
        "    --class_names face leopard ...",
    ),
    "convert-open-clip": ("clip-prompt convert-open-clip imageomics/bioclip-2 bioclip-2",),
}

# For the commands with more arguments than a screen has lines: what their help shows, by the titles of its groups.
FIRST: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "images": ("train_dir", "test_dir", "dataset_name", "train_file", "shots"),
        "model and prompt": ("model_name_or_path", "method", "teacher", "prompt_template"),
        "training": (
            "output_dir",
            "num_train_epochs",
            "learning_rate",
            "seed",
            "num_seeds",
            "push_to_hub",
        ),
    },
    "report": {"images to test on": ("test_dir", "test_file", "dataset_name", "style")},
    "benchmark": {
        "what to compare": ("methods", "data", "shots", "seeds", "metric"),
        "model and output": ("model_name_or_path", "device", "output_dir"),
    },
}
