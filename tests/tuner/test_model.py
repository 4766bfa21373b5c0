"""Which models the tuner takes, and that one adapter file fits them all."""

import copy

import pytest
import torch
from adapters import layer_of, randomize, tuned
from conftest import TINY_CLIP
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModel

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig, CLIPTextLearnableEmbeddings


MODELS = [CLIPModel, CLIPTextModelWithProjection, CLIPTextModel, CLIPForPromptClassification]
TEXTS = ["a photo of a animal.", "a photo of a fire truck.", "a photo of a sun."]


@pytest.fixture
def texts(tokenizer):
    return tokenizer(TEXTS, padding=True, return_tensors="pt")


def text_features(model, texts):
    """(B, E), of whichever model; a bare `CLIPTextModel` has no projection, so it lends one."""
    model = model.base_model.model if isinstance(model, PeftModel) else model
    if isinstance(model, CLIPTextModel):
        projection = CLIPModel.from_pretrained(TINY_CLIP).text_projection
        return projection(model(**texts).pooler_output)
    if isinstance(model, CLIPTextModelWithProjection):
        return model(**texts).text_embeds
    return model.get_text_features(**texts).pooler_output


@pytest.mark.parametrize(
    "model",
    [
        lambda: CLIPVisionModel.from_pretrained(TINY_CLIP),
        lambda: BertModel(
            BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ),
        lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)),
    ],
    ids=["CLIPVisionModel", "BertModel", "Sequential"],
)
def test_a_model_without_a_clip_text_tower_is_refused_by_name(request, model):
    name = request.node.callspec.id
    with pytest.raises(ValueError, match=f"{name} has no CLIP text embeddings .* nothing to tune. .* CLIPModel"):
        get_peft_model(model(), CLIPPromptTuningConfig())


def test_target_modules_may_name_the_text_embeddings(clip):
    model = tuned(clip, target_modules=["text_model.embeddings"])
    assert layer_of(model) is clip.text_model.embeddings


def test_a_target_module_that_holds_no_text_embeddings_is_refused(clip):
    with pytest.raises(ValueError, match="'vision_model.embeddings' is a CLIPVisionEmbeddings and holds no CLIP text"):
        get_peft_model(clip, CLIPPromptTuningConfig(target_modules=["vision_model.embeddings"]))


def test_a_model_that_holds_a_clip_somewhere_inside_is_tuned_too(clip, texts, tmp_path):
    class Wrapper(torch.nn.Module):
        def __init__(self, clip):
            super().__init__()
            self.encoder = clip

        def forward(self, **texts):
            return self.encoder.get_text_features(**texts).pooler_output

    config = CLIPPromptTuningConfig(tokenizer_name_or_path=TINY_CLIP)
    model = get_peft_model(Wrapper(clip), config)
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(CLIPModel.from_pretrained(TINY_CLIP), tmp_path)
    assert torch.equal(text_features(loaded, texts), model(**texts))


def test_a_text_tower_may_be_left_out(clip):
    pair = torch.nn.ModuleDict({"left": copy.deepcopy(clip.text_model), "right": clip.text_model})
    config = CLIPPromptTuningConfig(exclude_modules=["left.embeddings"], tokenizer_name_or_path=TINY_CLIP)
    get_peft_model(pair, config)
    assert not isinstance(pair["left"].embeddings, CLIPTextLearnableEmbeddings)
    assert isinstance(pair["right"].embeddings, CLIPTextLearnableEmbeddings)


def test_two_text_towers_may_have_an_adapter_each(clip, texts, tmp_path):
    def pair():
        return torch.nn.ModuleDict({"left": copy.deepcopy(clip.text_model), "right": copy.deepcopy(clip.text_model)})

    def config(side):
        return CLIPPromptTuningConfig(target_modules=[f"{side}.embeddings"], tokenizer_name_or_path=TINY_CLIP)

    model = get_peft_model(pair(), config("left"), adapter_name="of_left")
    model.add_adapter("of_right", config("right"))
    layers = [layer_of(model.base_model.model[side]) for side in ("left", "right")]
    assert [list(layer.learnable_embeddings) for layer in layers] == [["of_left"], ["of_right"]]
    torch.nn.init.normal_(layers[1].learnable_embeddings["of_right"])
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(pair(), tmp_path / "of_left", adapter_name="of_left")
    loaded.load_adapter(tmp_path / "of_right", adapter_name="of_right")
    loaded.set_adapter("of_right")
    right, untouched = loaded.base_model.model["right"], loaded.base_model.model["left"]
    model.set_adapter("of_right")
    expected = model.base_model.model["right"](**texts).pooler_output
    assert torch.equal(right(**texts).pooler_output, expected)
    assert torch.equal(untouched(**texts).pooler_output, clip.text_model(**texts).pooler_output)


def test_the_loss_of_clip_itself_can_be_trained(clip, texts, pixel_values):
    model = get_peft_model(clip, CLIPPromptTuningConfig())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(10):
        loss = model(**texts, pixel_values=pixel_values, return_loss=True).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("source", MODELS, ids=lambda model_class: model_class.__name__)
@pytest.mark.parametrize("target", MODELS, ids=lambda model_class: model_class.__name__)
def test_an_adapter_of_one_model_gives_the_same_text_features_in_every_other(tmp_path, texts, source, target):
    model = tuned(source.from_pretrained(TINY_CLIP))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(target.from_pretrained(TINY_CLIP), tmp_path).eval()
    assert torch.equal(text_features(loaded, texts), text_features(model, texts))


@pytest.mark.parametrize("target", MODELS, ids=lambda model_class: model_class.__name__)
def test_transformers_loads_an_adapter_of_clip_into_every_other_model(clip, tmp_path, texts, target):
    model = tuned(clip)
    model.save_pretrained(tmp_path)
    loaded = target.from_pretrained(TINY_CLIP).eval()
    loaded.load_adapter(tmp_path)
    assert torch.equal(text_features(loaded, texts), text_features(model, texts))


def test_an_adapter_of_another_method_is_not_mixed_in(clip):
    model = tuned(clip)
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))


def test_the_begin_token_cannot_be_replaced(clip):
    with pytest.raises(ValueError, match="start_idx must be at least 1, .* got 0"):
        get_peft_model(clip, CLIPPromptTuningConfig(start_idx=0))


def test_without_a_begin_token_the_vectors_start_at_position_0(clip, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", plain.eos_token_id)]
    )
    clip.tokenizer = plain
    model = get_peft_model(clip, CLIPPromptTuningConfig())
    config = model.active_peft_config
    assert config.start_idx == 0
    assert config.replaced_token_ids == plain("a photo of a", add_special_tokens=False)["input_ids"]
