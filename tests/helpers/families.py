"""A tiny random model of every family, with a tokenizer and an image processor of its kind."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from adapters import as_if_trained
from peft import get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    Aimv2Config,
    Aimv2Model,
    AltCLIPConfig,
    AltCLIPModel,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    GroupViTConfig,
    GroupViTModel,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from clip_prompt_peft import (
    Aimv2ForPromptClassification,
    AltCLIPForPromptClassification,
    ChineseCLIPForPromptClassification,
    CLIPForPromptClassification,
    CLIPPromptTuningConfig,
    GroupViTForPromptClassification,
    MetaClip2ForPromptClassification,
    Siglip2ForPromptClassification,
    SiglipForPromptClassification,
)


CLASS_NAMES = ["cat", "fire truck", "owl", "sun"]
ENGLISH = ["x", "a", "photo", "of", "art", ".", "cat", "fire", "truck", "owl", "sun", "an", "icon", "painting"]
WORDS = [*ENGLISH, *"一张的照片。"]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
NUM_POSITIONS, IMAGE_SIZE, PATCH_SIZE, WIDTH = 64, 24, 8, 48
VISION = {**TOWER, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}


def word_tokenizer(special, template, **kwargs):
    """Whole words, lower-cased; `special` are names of special tokens to their texts, in the order of their ids."""
    texts = list(dict.fromkeys(special.values()))
    vocab = {text: index for index, text in enumerate([*texts, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.BertNormalizer(lowercase=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    used = [(text, vocab[text]) for text in texts if text in template]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **kwargs)


def piece_tokenizer(special, template, **kwargs):
    """Pieces of words with the space in front of them, as sentencepiece makes them."""
    texts = list(dict.fromkeys(special.values()))
    pieces = (
        [(f"▁{word}", -2.0) for word in WORDS] + [("▁", -4.0)] + [(char, -6.0) for char in sorted(set("".join(WORDS)))]
    )
    vocab = [(text, 0.0) for text in texts] + pieces
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=texts.index(special["unk_token"])))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    used = [(text, texts.index(text)) for text in texts if text in template]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **kwargs)


def xlm_tokenizer():
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return piece_tokenizer(special, "<s> $A </s>")


def siglip_tokenizer():
    special = {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return piece_tokenizer(special, "$A </s>", model_input_names=["input_ids"], model_max_length=NUM_POSITIONS)


def gemma_tokenizer():
    """Pairs of pieces merged, as in SigLIP 2."""
    vocab = {token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])}
    pieces = [word[:end] for word in WORDS for end in range(1, len(word) + 1)]
    for piece in ["▁", *"".join(WORDS), *pieces, *(f"▁{word}" for word in WORDS)]:
        vocab.setdefault(piece, len(vocab))
    merges = dict.fromkeys(
        [*((piece[:-1], piece[-1]) for piece in pieces if piece[1:]), *(("▁", word) for word in WORDS)]
    )
    return Siglip2Tokenizer(
        vocab=vocab, merges=list(merges), add_bos_token=False, add_eos_token=True, padding_side="right",
        model_input_names=["input_ids"], model_max_length=NUM_POSITIONS,
    )  # fmt: skip


def bert_tokenizer():
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return word_tokenizer(special, "[CLS] $A [SEP]")


def clip_tokenizer():
    # the end token must not be 2, which means something else in old configs
    special = {"bos_token": "<s>", "unk_token": "<unk>", "mask_token": "<m>", "eos_token": "</s>", "pad_token": "</s>"}
    return word_tokenizer(special, "<s> $A </s>")


@dataclass(frozen=True)
class Family:
    """One family, at tiny size."""

    base_class: type
    classifier_class: type
    config_class: type
    make_tokenizer: Callable
    text: dict
    image_processor: object
    vision: dict
    both: dict
    template: str = "a photo of a {}."

    @property
    def name(self):
        return self.classifier_class.family_name()

    def config(self):
        tokenizer = self.make_tokenizer()
        ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        text = {**TOWER, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": NUM_POSITIONS, **self.text}
        return self.config_class(text_config=text, vision_config=self.vision, **self.both)

    def base(self):
        torch.manual_seed(0)
        model = self.base_class(self.config()).eval()
        for name, parameter in model.named_parameters():  # every part is to matter
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.3)
            elif name == "logit_bias":
                parameter.data.fill_(-2.0)
            elif name == "logit_scale":
                parameter.data.fill_(1.5)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):  # as after a training
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
        return model

    def classifier(self, **kwargs):
        settings = {"class_names": CLASS_NAMES, "prompt_template": self.template, **kwargs}
        return self.classifier_class.from_base(self.base(), self.make_tokenizer(), **settings)

    def save(self, folder):
        self.base().save_pretrained(folder)
        self.make_tokenizer().save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        return folder

    def image_inputs(self, num_images=4):
        generator = torch.Generator().manual_seed(1)
        if self.base_class is not Siglip2Model:
            return {"pixel_values": torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
        shapes = torch.tensor([[3, 3], [2, 4], [4, 2], [1, 5]])[:num_images]
        mask = (torch.arange(9) < shapes.prod(dim=1, keepdim=True)).long()  # (B, patches)
        patches = torch.randn(num_images, 9, 3 * PATCH_SIZE**2, generator=generator)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}

    def texts(self, texts):
        """As the family's processor reads them."""
        tokenizer = self.make_tokenizer()
        if self.base_class in (SiglipModel, Siglip2Model):
            return tokenizer(texts, padding="max_length", max_length=NUM_POSITIONS, return_tensors="pt")
        return tokenizer(texts, padding=True, return_tensors="pt")


PROJECTED = {"projection_dim": WIDTH}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SQUARE = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
CROPPED = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
STAGES = {"depths": [1, 1, 1], "num_group_tokens": [6, 4, 0], "num_output_groups": [6, 4, 4]}

FAMILIES = {
    family.name: family
    for family in [
        Family(
            CLIPModel, CLIPForPromptClassification, CLIPConfig, clip_tokenizer,
            PROJECTED, CLIPImageProcessorPil(**CROPPED), {**VISION, **PROJECTED}, PROJECTED,
        ),
        Family(
            MetaClip2Model, MetaClip2ForPromptClassification, MetaClip2Config, xlm_tokenizer,
            PROJECTED, CLIPImageProcessorPil(**CROPPED), {**VISION, **PROJECTED}, PROJECTED,
        ),
        Family(
            SiglipModel, SiglipForPromptClassification, SiglipConfig, siglip_tokenizer,
            {}, SiglipImageProcessorPil(**SQUARE), VISION, {},
        ),
        Family(
            Siglip2Model, Siglip2ForPromptClassification, Siglip2Config, gemma_tokenizer,
            {}, Siglip2ImageProcessorPil(patch_size=PATCH_SIZE, max_num_patches=9),
            {**TOWER, "patch_size": PATCH_SIZE, "num_patches": 9}, {},
        ),
        Family(
            ChineseCLIPModel, ChineseCLIPForPromptClassification, ChineseCLIPConfig, bert_tokenizer,
            NO_DROPOUT, CLIPImageProcessorPil(**CROPPED), {**VISION, **PROJECTED}, PROJECTED, "一张{}的照片。",
        ),
        Family(
            AltCLIPModel, AltCLIPForPromptClassification, AltCLIPConfig, xlm_tokenizer,
            {**NO_DROPOUT, "project_dim": 40}, CLIPImageProcessorPil(**CROPPED), {**VISION, **PROJECTED}, PROJECTED,
        ),
        Family(
            Aimv2Model, Aimv2ForPromptClassification, Aimv2Config, clip_tokenizer,
            {}, CLIPImageProcessorPil(**CROPPED), VISION, PROJECTED,
        ),
        Family(
            GroupViTModel, GroupViTForPromptClassification, GroupViTConfig, clip_tokenizer,
            {}, CLIPImageProcessorPil(**CROPPED),
            {**VISION, **STAGES}, {**PROJECTED, "projection_intermediate_dim": 40},
        ),
    ]
}  # fmt: skip


# Presets with prompts in deeper layers of the image tower, which a tower of stages does not take.
DEEP_VISION = ("vpt-deep", "ivlp", "maple", "promptsrc", "promptkd")


def takes(name, preset):
    return name != "GroupViT" or preset not in DEEP_VISION


@functools.cache
def load_classifier(name):
    return FAMILIES[name].classifier()


class Case:
    """A family, with images for it."""

    def __init__(self, name):
        self.name, self.family = name, FAMILIES[name]
        self.images = self.family.image_inputs()

    def classifier(self):
        return copy.deepcopy(load_classifier(self.name))

    def prompted(self, preset=None, seed=0, **fields):
        """As if it had been trained."""
        classifier = self.classifier()
        torch.manual_seed(seed)
        make = CLIPPromptTuningConfig if preset is None else functools.partial(self.from_preset, preset, classifier)
        model = get_peft_model(classifier, make(**fields)).eval()
        return as_if_trained(model, std=0.3, seed=seed)

    @staticmethod
    def from_preset(preset, classifier, **fields):
        return CLIPPromptTuningConfig.from_preset(preset, model=classifier, **fields)

    @torch.no_grad()
    def logits(self, model):
        return model(**self.images).logits

    @torch.no_grad()
    def logits_of_family(self, model, template):
        """Those of the family's own `forward`, with texts as its processor makes them."""
        texts = self.family.texts([template.replace("{}", name) for name in CLASS_NAMES])
        return model(**self.images, **texts).logits_per_image
