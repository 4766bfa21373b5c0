"""PromptKD's student: a projector behind the image tower, and class embeddings of a teacher for the text tower's."""

import copy

import pytest
import torch
from adapters import WEIGHTS, as_if_trained, logits_of
from cases import new_classifier
from conftest import CLASS_NAMES
from families import Case as FamilyCase
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPModel

from clip_prompt_peft import CLIPPromptTuningConfig, method_config
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.heads import ClassHead
from clip_prompt_peft.regularizers import build_regularizer


WIDTH = 24
MORE_NAMES = ["clock", "house"]


def student(**fields):
    """A student whose tensors are those of no particular training, with a teacher's embeddings of width 24."""
    classifier = new_classifier()
    config = method_config("promptkd", classifier, projection_dim=WIDTH, **fields)
    return as_if_trained(get_peft_model(classifier, config)).eval()


@pytest.fixture
def model():
    return student()


def test_its_class_head_answers_all_that_a_class_head_does(model):
    head = model.get_base_model().class_head
    assert not isinstance(head, ClassHead)
    for name in vars(ClassHead):
        assert name.startswith("_") or hasattr(head, name), name


def rows(model):
    return model.get_class_embeds().clone()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projection_dim": 0}, "projection_dim must be an integer from 1 to 8192, or None, got 0"),
        ({"projection_dim": 10**6}, "projection_dim must be an integer from 1 to 8192, or None, got 1000000"),
        ({"projection_dim": True}, "projection_dim must be an integer from 1 to 8192, or None, got True"),
        ({"projection_dim": 24}, "text vectors would have no effect; set num_virtual_tokens=0, got None"),
        ({"projection_dim": 24, "num_virtual_tokens": 4}, "set num_virtual_tokens=0, got 4"),
        (
            {"projection_dim": 24, "num_virtual_tokens": 0, "regularizer": "kgcoop"},
            "regularizer='kgcoop' compares with the zero-shot model, .* projection_dim=24",
        ),
        (
            {"projection_dim": 24, "num_virtual_tokens": 0, "image_conditioned": True},
            "image_conditioned=True is about",
        ),
    ],
)
def test_fields_that_exclude_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CLIPPromptTuningConfig(**fields)


def test_a_plain_clip_has_no_place_for_the_projector():
    clip = CLIPModel.from_pretrained(TINY_CLIP)
    before = clip.state_dict().keys()
    with pytest.raises(ValueError, match="for which CLIPModel has no place; use a classifier"):
        get_peft_model(clip, CLIPPromptTuningConfig.from_preset("promptkd", model=clip, class_names=CLASS_NAMES))
    assert clip.state_dict().keys() == before


def test_without_class_names_there_is_nothing_to_store_embeddings_for():
    classifier = new_classifier()
    classifier.config.class_names = None
    with pytest.raises(ValueError, match="projection_dim stores an embedding .* no class names are known"):
        get_peft_model(classifier, method_config("promptkd", classifier))


@pytest.mark.parametrize("name", ["image_head", "class_head"])
def test_no_head_can_be_left_out(name):
    classifier = new_classifier()
    with pytest.raises(ValueError, match=f"exclude_modules leaves out '{name}', but projection_dim=768 needs both"):
        get_peft_model(classifier, method_config("promptkd", classifier, exclude_modules=[name]))


def test_logits_are_those_of_the_projected_images_and_the_teachers_classes(model, pixel_values):
    classifier = model.get_base_model()
    head = classifier.image_head
    parts = [getattr(head, name)["default"] for name in head.adapter_layer_names]
    with torch.no_grad():
        hidden = parts[0](classifier.get_image_features(pixel_values=pixel_values).pooler_output)
        norm = parts[1]
        hidden = (hidden - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
        images = torch.nn.functional.normalize(parts[2](hidden.relu()), dim=1)
        assert model.get_class_embeds().shape == (len(CLASS_NAMES), WIDTH)
        expected = classifier.logit_scale.exp() * images @ model.get_class_embeds().T
    assert_close(logits_of(model, pixel_values), expected, rtol=0, atol=1e-4)


def test_the_text_tower_is_not_needed_to_answer(model, pixel_values):
    expected = logits_of(model, pixel_values)
    text_model = model.get_base_model().text_model
    del text_model.encoder, text_model.final_layer_norm, model.get_base_model().text_projection
    text_model.to("meta")
    assert torch.equal(logits_of(model, pixel_values), expected)


def test_before_a_teacher_is_known_there_is_no_answer_and_no_file(pixel_values, tmp_path):
    classifier = new_classifier()
    model = get_peft_model(classifier, method_config("promptkd", classifier, projection_dim=WIDTH)).eval()
    with pytest.raises(ValueError, match="'default' has no class embeddings of a teacher yet .*'animal'"):
        model(pixel_values=pixel_values)
    with pytest.raises(ValueError, match="not saved, since it has no class embeddings of a teacher yet"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.set_teacher_class_embeds(torch.randn(2, WIDTH), CLASS_NAMES[:2])
    with pytest.raises(ValueError, match="'default' has no class embeddings of a teacher yet .*'food'"):
        model(pixel_values=pixel_values)


def test_embeddings_of_another_shape_or_without_values_are_refused_and_change_nothing(model):
    before = rows(model)
    with pytest.raises(ValueError, match=r"must be \(4, 24\), .* got \(4, 23\)"):
        model.set_teacher_class_embeds(torch.randn(4, 23))
    with pytest.raises(ValueError, match="hold NaN or Inf"):
        model.set_teacher_class_embeds(torch.full((4, WIDTH), float("nan")))
    with pytest.raises(ValueError, match="No adapter with class embeddings of a teacher is active"):
        new_classifier().set_teacher_class_embeds(torch.randn(4, WIDTH))
    with model.disable_adapter(), pytest.raises(ValueError, match="No adapter with class embeddings"):
        model.set_teacher_class_embeds(torch.randn(4, WIDTH))
    assert torch.equal(rows(model), before)


def test_known_classes_can_be_chosen_and_others_are_refused_by_name(model):
    before = rows(model)
    model.set_class_names(["food", "animal"])
    assert torch.equal(rows(model), before[[2, 0]])
    with pytest.raises(ValueError, match="'default' knows no class 'clock', 'house': it compares images with class"):
        model.set_class_names(["animal", *MORE_NAMES])
    assert model.get_base_model().class_names == ["food", "animal"]
    model.set_class_names(CLASS_NAMES)
    assert torch.equal(rows(model), before)


def test_a_teacher_can_give_embeddings_of_new_classes_which_are_saved(model, tmp_path, pixel_values):
    before, added = rows(model), torch.randn(2, WIDTH)
    model.set_teacher_class_embeds(added, MORE_NAMES)
    assert torch.equal(rows(model), before)  # the classes in use stay
    model.set_class_names(["house", "plant"])
    normalized = torch.nn.functional.normalize(added, dim=1)
    assert_close(rows(model), torch.stack([normalized[1], before[1]]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(new_classifier(["a", "b"]), tmp_path).eval()
    assert loaded.get_base_model().class_names == ["house", "plant"]
    assert_close(logits_of(loaded, pixel_values), logits_of(model, pixel_values))
    loaded.set_class_names([*CLASS_NAMES, *MORE_NAMES])
    assert_close(rows(loaded), torch.cat([before, normalized]))


def test_class_embeddings_are_never_trained(model):
    embeds = model.get_base_model().class_head.learnable_teacher_embeds["default"]
    model.add_adapter("other", CLIPPromptTuningConfig())
    for switch in (lambda: model.set_adapter("other"), lambda: model.set_adapter("default"), model.train):
        switch()
        assert not embeds.requires_grad
    with model.disable_adapter():
        assert not embeds.requires_grad
    assert not embeds.requires_grad


def test_images_of_a_batch_have_adapters_of_their_own(model, pixel_values):
    model.add_adapter("coop", CLIPPromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="RANDOM"))
    names = ["coop", "default", "__base__"]
    found = model(pixel_values=pixel_values, adapter_names=names).logits
    for index, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits_of(model, pixel_values)
        else:
            model.set_adapter(name)
            expected = logits_of(model, pixel_values)
        assert_close(found[index], expected[index], rtol=0, atol=1e-4)


def test_a_projector_alone_is_trained_on_cached_embeddings_and_with_vision_prompts_is_not(model, pixel_values):
    embeds = torch.randn(3, model.get_base_model().embed_width)
    alone = student(num_vision_virtual_tokens=0, vision_prompt_depth=1).train()
    alone(image_embeds=embeds).logits.sum().backward()
    assert all(p.grad is not None for p in alone.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="train with pixel_values"):
        model.train()(image_embeds=embeds)


def test_a_training_batch_of_one_image_is_refused_with_what_to_do(model, pixel_values):
    with pytest.raises(ValueError, match="single image has no variance.*dataloader_drop_last=True"):
        model.train()(pixel_values=pixel_values[:1])
    model.eval()(pixel_values=pixel_values[:1])


def test_further_regularizers_are_refused_in_training(model, pixel_values, labels):
    model.get_base_model().regularizers["kgcoop"] = build_regularizer("kgcoop")
    with pytest.raises(ValueError, match=r"\['kgcoop'\] compare with the zero-shot model, .* projection_dim=24"):
        model.train()(pixel_values=pixel_values, labels=labels)
    model.eval()(pixel_values=pixel_values, labels=labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norm_computes_in_float32_inside_of_autocast(model, pixel_values, dtype):
    norm = model.get_base_model().image_head.learnable_projector_norm["default"]
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    expected = model.train()(pixel_values=pixel_values).logits.detach()
    statistics = norm.running_mean.clone()
    with torch.autocast("cpu", dtype):
        found = model(pixel_values=pixel_values).logits
    found.sum().backward()
    assert seen == [torch.float32, torch.float32] and norm.running_mean.dtype == torch.float32
    assert not torch.equal(norm.running_mean, statistics)
    assert_close(found.detach(), expected, rtol=0, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_answer_alike(model, pixel_values, dtype):
    expected = logits_of(model, pixel_values)
    half = copy.deepcopy(model).to(dtype)
    assert_close(logits_of(half, pixel_values.to(dtype)).float(), expected, rtol=0, atol=1.0)


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
def test_other_families_are_students_too(family, tmp_path):
    case = FamilyCase(family)
    classifier = case.classifier()
    model = get_peft_model(classifier, method_config("promptkd", classifier, projection_dim=WIDTH))
    as_if_trained(model).eval()
    with torch.no_grad():
        expected = model(**case.images).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(case.classifier(), tmp_path).eval()
        assert_close(loaded(**case.images).logits, expected, rtol=0, atol=1e-4)
    model.train()(**case.images).logits.sum().backward()


@pytest.mark.parametrize("what", ["running_var", "learnable_teacher_embeds", "learnable_projector_norm"])
def test_damaged_tensors_are_noticed(model, tmp_path, what):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (name,) = [name for name in tensors if what in name][:1]
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="holds NaN, Inf"):
        PeftModel.from_pretrained(new_classifier(), tmp_path)
    del tensors[name]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="hold no .*" + what):
        PeftModel.from_pretrained(new_classifier(), tmp_path)


@pytest.mark.slow  # tracing takes a while
@pytest.mark.skipif(torch.__version__ < (2, 10), reason="torch 2.6 cannot export its own MultiheadAttention")
def test_the_exported_graph_has_the_projector_in_it(model, image_processor, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from clip_prompt_peft.export import CLASS_EMBEDS_FILE, ONNX_FILE, export_classifier

    export_classifier(model, tmp_path, image_processor=image_processor)
    pixel_values = torch.randn(3, 3, 48, 48)
    session = onnxruntime.InferenceSession(tmp_path / ONNX_FILE)
    logits, image_embeds = session.run(None, {"pixel_values": pixel_values.numpy()})
    assert_close(torch.from_numpy(logits), logits_of(model, pixel_values), rtol=0, atol=1e-3)
    assert image_embeds.shape == (3, WIDTH)
    assert load_file(tmp_path / CLASS_EMBEDS_FILE)["class_embeds"].shape == (4, WIDTH)
