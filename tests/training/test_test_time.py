"""Test-time tuning: many images at once as one by one, on what it works, what it refuses, and what it leaves alone."""

import copy
import threading

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from adapters import as_if_trained, vectors_of
from conftest import CLASS_NAMES, slow_param
from families import FAMILIES
from families import Case as FamilyCase
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.testing import assert_close
from transformers import AutoImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from clip_prompt_peft import CLIPPromptTuningConfig, DynamicAdapter, TestTimeTuner, fit_class_head, method_config
from clip_prompt_peft.assets import TINY_CLIP
from clip_prompt_peft.data import RandomViews
from clip_prompt_peft.heads import ClassHead, ImageHead
from clip_prompt_peft.training.test_time import OBJECTIVES


SHARED = ["coop", "kgcoop", slow_param("prograd"), "ivlp", slow_param("promptsrc")]
VIEWS = 24


@pytest.fixture
def views():
    """Views (3, 24, 3, 48, 48): noise around an image each."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(3, 1, 3, 48, 48, generator=generator)
    return images + 0.7 * torch.randn(3, VIEWS, 3, 48, 48, generator=generator)


def with_adapter(classifier, preset=None, **fields):
    make = CLIPPromptTuningConfig if preset is None else CLIPPromptTuningConfig.from_preset
    arguments = () if preset is None else (preset, classifier)
    return as_if_trained(get_peft_model(classifier, make(*arguments, **fields)).eval(), std=0.05)


def lossless(model):
    """Everything of a model that a call could change."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return (
        {name: (id(tensor), tensor.detach().clone()) for name, tensor in model.state_dict(keep_vars=True).items()},
        [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()],
        [(name, id(module), module.training) for name, module in model.named_modules()],
        base.class_encoder.__dict__.copy(),
        base.class_names,
    )


def assert_unchanged(model, before):
    for old, new in zip(before, lossless(model)):
        if isinstance(old, dict) and old and isinstance(next(iter(old.values())), tuple):
            assert old.keys() == new.keys()
            assert all(old[key][0] == new[key][0] and torch.equal(old[key][1], new[key][1]) for key in old)
        else:
            assert old == new


def each_by_itself(tuner, embeds):
    outputs = [tuner(image_embeds=embeds[index : index + 1]) for index in range(len(embeds))]
    return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}


def assert_as_one_by_one(tuner, views):
    """Gradients to 1e-5 of their maximum, and answers where both are handed the same gradient."""
    embeds = tuner.embed_views(views)
    batched, single = tuner(image_embeds=embeds), each_by_itself(tuner, embeds)
    assert batched.kept_views.tolist() == single["kept_views"].tolist()
    assert_close(batched.loss, single["loss"], atol=1e-5, rtol=1e-5)
    for found, expected in zip(batched.gradients, single["gradients"]):
        assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    flipped = batched.gradients.sign() != single["gradients"].sign()
    print(f"{int(flipped.sum())} of {flipped.numel()} signs flipped")
    given = tuner._tune(None, embeds, single["gradients"])
    assert_close(given.logits, single["logits"], atol=1e-5 * float(single["logits"].abs().max()), rtol=0)


def plain_step(model, vectors, views, objective, dispersion_weight):
    """One step as the papers write it, by autograd through the plain text tower of a classifier with an adapter."""
    with torch.no_grad():
        embeds = torch.nn.functional.normalize(model.get_base_model().get_image_features(views).pooler_output, dim=-1)
    scale = model.get_base_model().logit_scale.detach().exp()
    vectors.requires_grad_(True)
    classes = model.get_base_model().get_class_embeds()
    probabilities = (scale * embeds @ classes.T).softmax(dim=-1)
    entropies = -(probabilities * probabilities.log()).sum(dim=-1)
    kept = entropies.argsort()[: int(0.1 * len(views))]
    mean = probabilities[kept].mean(dim=0)
    loss = entropies[kept].mean() if objective == "r-tpt" else -(mean * mean.log()).sum()
    if objective == "c-tpt":
        loss = loss - dispersion_weight * (classes - classes.mean(dim=0)).norm(dim=-1).mean()
    optimizer = torch.optim.AdamW([vectors], lr=5e-3)
    loss.backward()
    gradient = vectors.grad.clone()
    optimizer.step()
    with torch.no_grad():
        logits = scale * embeds @ model.get_base_model().get_class_embeds().T
    return gradient, logits


# What it computes


@pytest.mark.parametrize(
    ("preset", "objective"), [("kgcoop", "tpt"), ("kgcoop", "c-tpt"), ("kgcoop", "r-tpt"), ("ivlp", "tpt")]
)
def test_a_step_is_that_of_the_paper_through_the_plain_tower(preset, objective, classifier, views):
    model = with_adapter(classifier, preset)
    output = TestTimeTuner(model, objective, dispersion_weight=3.0)(views[:1])
    other = copy.deepcopy(model)
    other.get_base_model().class_encoder.path = "plain"
    gradient, logits = plain_step(other, vectors_of(other), views[0], objective, 3.0)
    assert_close(output.gradients[0], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=0)
    assert (output.gradients[0].sign() == gradient.sign()).all()
    assert_close(output.vectors[0], vectors_of(other).detach(), atol=1e-6, rtol=0)
    if objective != "r-tpt":
        assert_close(output.logits[0], logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_many_images_are_tuned_as_one_by_one(objective, classifier, views):
    before = lossless(classifier)
    assert_as_one_by_one(TestTimeTuner(classifier, objective), views)
    assert_unchanged(classifier, before)


@pytest.mark.parametrize("preset", SHARED)
def test_presets_with_a_shared_context_can_be_tuned(preset, classifier, views):
    model = with_adapter(classifier, preset)
    before = lossless(model)
    assert_as_one_by_one(TestTimeTuner(model, "c-tpt"), views)
    assert_unchanged(model, before)


@pytest.mark.parametrize("position", ["middle", "front"])
def test_class_names_may_stand_elsewhere(position, classifier, views):
    model = with_adapter(classifier, num_virtual_tokens=4, class_token_position=position)
    assert_as_one_by_one(TestTimeTuner(model), views)


def test_later_steps_follow_each_image_by_itself(classifier, views):
    model = with_adapter(classifier, "kgcoop")
    tuner = TestTimeTuner(model, steps=3)
    assert_as_one_by_one(tuner, views)
    assert not torch.allclose(tuner(views[:1]).logits, TestTimeTuner(model)(views[:1]).logits, atol=1e-3)


@pytest.mark.parametrize("steps", [slow_param(1), 2])
def test_chunks_of_classes_and_of_images_change_nothing(steps, classifier, views):
    """Beyond one chunk, no graph is kept, and each chunk is encoded again for its gradients."""
    tuner = TestTimeTuner(classifier, "c-tpt", steps=steps)
    embeds = tuner.embed_views(views)
    whole = tuner(image_embeds=embeds)
    classifier.class_encoder.batch_size = 3  # 4 classes
    for batch_size in (1, 2, 16):
        tuner.batch_size = batch_size
        parts = tuner(image_embeds=embeds)
        assert_close(parts.gradients, whole.gradients, atol=1e-5 * float(whole.gradients.abs().max()), rtol=0)
        assert_close(parts.logits, whole.logits, atol=1e-4, rtol=1e-4)


def test_without_an_adapter_it_starts_from_the_words_of_the_template(classifier, views):
    classifier.set_prompt_template("a drawing of one {}.")
    words = get_peft_model(copy.deepcopy(classifier), CLIPPromptTuningConfig()).eval()
    found, expected = TestTimeTuner(classifier)(views), TestTimeTuner(words)(views)
    assert found.gradients.shape[1] == len(vectors_of(words))
    assert_close(found.gradients, expected.gradients)
    assert_close(found.logits, expected.logits)


def test_a_disabled_adapter_does_not_count(classifier, views):
    expected = TestTimeTuner(copy.deepcopy(classifier))(views).logits
    model = with_adapter(classifier, "coop")
    with model.disable_adapter():
        assert_close(TestTimeTuner(model)(views).logits, expected)
    assert not torch.allclose(TestTimeTuner(model)(views).logits, expected, atol=1e-3)


def test_lora_in_the_towers_stays_in_effect(classifier, views):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = with_adapter(classifier, "kgcoop")
    plain = TestTimeTuner(model)(views)
    model.get_base_model().add_adapter(config, "lora")
    model.eval()
    assert_as_one_by_one(TestTimeTuner(model), views)
    assert not torch.allclose(TestTimeTuner(model)(views).gradients, plain.gradients, atol=1e-4)


@pytest.mark.parametrize("name", [name if name in ("Siglip", "AltCLIP") else slow_param(name) for name in FAMILIES])
def test_every_family_can_be_tuned(name):
    case = FamilyCase(name)
    embeds = torch.randn(3, VIEWS, case.classifier().embed_width, generator=torch.Generator().manual_seed(0))
    for model in (case.classifier().eval(), case.prompted("kgcoop")):
        tuner, before = TestTimeTuner(model, "c-tpt"), lossless(model)
        batched = tuner(image_embeds=embeds)
        single = torch.cat([tuner(image_embeds=views[None]).gradients for views in embeds])
        assert_close(batched.gradients, single, atol=1e-5 * float(single.abs().max()), rtol=0)
        assert_unchanged(model, before)
        with torch.no_grad():
            own = model(image_embeds=embeds[:, 0]).logits
        still = TestTimeTuner(model, learning_rate=1e-12)(image_embeds=embeds)
        assert_close(still.logits, own, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(batched.logits, own, atol=1e-3)


def test_the_scale_is_that_of_the_family():
    """AIMv2 cuts its scale at 100, whatever its parameter says."""
    model = FamilyCase("Aimv2").classifier().eval()
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
        embeds = torch.randn(2, VIEWS, model.embed_width, generator=torch.Generator().manual_seed(0))
        own = model(image_embeds=embeds[:, 0]).logits
    still = TestTimeTuner(model, learning_rate=1e-12)(image_embeds=embeds)
    assert_close(still.logits, own, atol=1e-3, rtol=1e-4)
    assert DynamicAdapter.of(model).logit_scale == pytest.approx(100.0, rel=1e-4)


# What goes in


def test_views_can_be_embedded_once_for_all_objectives(classifier, views):
    embeds = TestTimeTuner(classifier).embed_views(views[:2])
    assert embeds.shape == (2, VIEWS, classifier.embed_width)
    for objective in OBJECTIVES:
        tuner = TestTimeTuner(classifier, objective)
        assert_close(tuner(image_embeds=embeds).logits, tuner(views[:2]).logits)


def test_images_of_pillow_become_views(classifier):
    processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    images = [Image.effect_noise((60, 40), 90).convert(mode) for mode in ("RGB", "L")]
    generator = torch.Generator().manual_seed(3)
    tuner = TestTimeTuner(classifier, views=RandomViews(processor, num_views=12, generator=generator))
    output = tuner(images)
    assert isinstance(output, ImageClassifierOutput)
    assert output.logits.shape == (2, len(CLASS_NAMES)) and output.entropies.shape == (2, 12)
    generator.manual_seed(3)
    assert torch.equal(tuner(images).logits, output.logits)
    assert tuner(images[0]).logits.shape == (1, len(CLASS_NAMES))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_in_every_mode_of_the_caller(mode, classifier, views):
    tuner = TestTimeTuner(classifier)
    expected = tuner(views).logits
    with mode():
        output = tuner(views.clone())
    assert not output.logits.requires_grad and not output.logits.is_inference()
    assert_close(output.logits, expected)


def test_gradient_checkpointing_of_the_model_does_not_matter(classifier, views):
    expected = TestTimeTuner(classifier)(views).logits
    classifier.gradient_checkpointing_enable()
    assert_close(TestTimeTuner(classifier)(views).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow_param(torch.float16)])
def test_a_base_in_half_precision_is_tuned_in_single_precision(dtype, classifier, views):
    expected = TestTimeTuner(classifier)(views)
    output = TestTimeTuner(classifier.to(dtype))(views)
    assert output.vectors.dtype == output.logits.dtype == torch.float32
    agreeing = (output.gradients.sign() == expected.gradients.sign()).float().mean()
    assert agreeing > 0.9 and (output.gradients != 0).float().mean() > 0.95
    assert_close(output.entropies, expected.entropies, atol=0.1, rtol=0)


def test_it_works_under_autocast(classifier, views):
    expected = TestTimeTuner(classifier)(views)
    with torch.autocast("cpu", torch.bfloat16):
        output = TestTimeTuner(classifier)(views)
    assert output.logits.dtype == torch.float32
    assert (output.gradients.sign() == expected.gradients.sign()).float().mean() > 0.9


def test_threads_share_a_model(classifier, views):
    model = with_adapter(classifier, "kgcoop")
    tuner, outputs = TestTimeTuner(model), {}
    embeds = tuner.embed_views(views)
    expected = each_by_itself(tuner, embeds)["logits"]

    def tune(index):
        outputs[index] = [tuner(image_embeds=embeds[index : index + 1]).logits for _ in range(3)]

    threads = [threading.Thread(target=tune, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        for logits in outputs[index]:
            assert_close(logits[0], expected[index])


# What it refuses


@pytest.mark.parametrize(
    ("preset", "reason"),
    [
        ("coop-csc", "differ from class to class"),
        ("cocoop", "depend on the image"),
        ("tcp", "in a deeper layer differ from class to class"),
        ("vpt-shallow", "no vectors in the text"),
        ("vpt-deep", "no vectors in the text"),
        ("maple", "maps of its text vectors"),
    ],
)
def test_adapters_without_a_shared_context_are_refused(preset, reason, classifier, views):
    tuner = TestTimeTuner(with_adapter(classifier, preset))
    with pytest.raises(ValueError, match=f"'default' cannot be tuned at test time.*{reason}"):
        tuner(views)


def test_merged_and_several_adapters_are_refused(classifier, views):
    model = with_adapter(classifier, "kgcoop")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        TestTimeTuner(model)(views)


def test_training_mode_is_refused(classifier, views):
    model = with_adapter(classifier, "kgcoop").train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        TestTimeTuner(model)(views)


def test_several_labels_for_an_image_are_refused(classifier, views):
    classifier.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="exactly one label"):
        TestTimeTuner(classifier)(views)


def test_class_embeddings_from_elsewhere_are_refused(classifier, views):
    classifier.set_class_embeds(torch.ones(len(CLASS_NAMES), classifier.embed_width))
    with pytest.raises(ValueError, match=r"set_class_embeds\(None\)"):
        TestTimeTuner(classifier)(views)


def test_adapters_behind_the_towers_are_refused(classifier, views):
    class OwnClasses(ClassHead):
        def class_embeds(self, class_names, encode):
            return 2 * encode()

    class OwnLogits(ClassHead):
        def forward(self, image_embeds, logits, class_names):
            return 2 * logits

    for head, message in ((OwnClasses(), "class embeddings of its own"), (OwnLogits(), "adds to the logits")):
        classifier.class_head = head.eval()
        with pytest.raises(ValueError, match=message):
            TestTimeTuner(classifier)(views)
    with pytest.raises(ValueError, match="adds to the logits"):
        DynamicAdapter.of(classifier)


@pytest.mark.parametrize(
    ("name", "message"), [("clap", "class embeddings of its own"), ("tip-adapter", "adds to the logits")]
)
def test_class_heads_are_refused(name, message, classifier, views):
    model = get_peft_model(classifier, method_config(name, classifier))
    fit_class_head(model, {"image_embeds": torch.randn(8, classifier.embed_width), "labels": torch.arange(8) % 4})
    tuner = TestTimeTuner(model.eval())
    with pytest.raises(ValueError, match=message):
        tuner(views)
    with model.disable_adapter():
        tuner.check()


def test_a_text_tower_that_is_spread_by_accelerate_is_refused(classifier, views):
    dispatch_model(classifier, {"": "cpu"}, force_hooks=True)
    add_hook_to_module(classifier.text_model.encoder.layers[0], ModelHook())
    with pytest.raises(ValueError, match="without device_map"):
        TestTimeTuner(classifier)(views)


def test_an_image_head_maps_the_views(classifier, views):
    class Flip(ImageHead):
        def forward(self, image_embeds):
            return -image_embeds

    embeds = TestTimeTuner(classifier).embed_views(views[:1])
    expected = TestTimeTuner(classifier)(image_embeds=-embeds).logits
    classifier.image_head = Flip().eval()
    assert_close(TestTimeTuner(classifier)(image_embeds=embeds).logits, expected)


def test_a_template_without_words_is_refused(classifier, views):
    classifier.set_prompt_template("{} photo")
    with pytest.raises(ValueError, match="no words in front"):
        TestTimeTuner(classifier)(views)


@pytest.mark.parametrize(
    ("objective", "number", "message"),
    [
        ("tpt", 9, "Of 9 views of an image, selection=0.1 keeps none; give at least 10"),
        ("r-tpt", 20, "at least 21 views of each image, got 20"),
    ],
)
def test_too_few_views_are_refused(objective, number, message, classifier, views):
    for arguments in ({"images": views[:, :number]}, {"image_embeds": torch.ones(2, number, classifier.embed_width)}):
        with pytest.raises(ValueError, match=message):
            TestTimeTuner(classifier, objective)(**arguments)


def test_inputs_that_are_no_views_are_refused(classifier, views):
    tuner = TestTimeTuner(classifier)
    with pytest.raises(ValueError, match=r"must be \(B, V, 3, H, W\).*got \(3, 3, 48, 48\)"):
        tuner(views[:, 0])
    with pytest.raises(ValueError, match="no images"):
        tuner([])
    with pytest.raises(ValueError, match="neither"):
        tuner()
    with pytest.raises(TypeError, match="got str"):
        tuner(["cat.jpg"])
    with pytest.raises(ValueError, match=r"views=RandomViews\(image_processor\)"):
        tuner(Image.new("RGB", (9, 9)))
    with pytest.raises(ValueError, match=r"NaN or Inf.*view 2 of image 1"):
        tuner(image_embeds=torch.ones(2, 12, classifier.embed_width).index_put((torch.tensor(1), torch.tensor(2)),
                                                                            torch.tensor(float("nan"))))  # fmt: skip
    with pytest.raises(ValueError, match=r"must be \(B, V, \d+\)"):
        tuner(image_embeds=torch.ones(2, 12, 7))


def test_patches_of_any_shape_are_refused():
    model = FamilyCase("Siglip2").classifier().eval()
    with pytest.raises(ValueError, match="image_embeds"):
        TestTimeTuner(model)(torch.zeros(1, 12, 3, 24, 24))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "o-tpt"}, "'tpt', 'c-tpt', 'r-tpt', got 'o-tpt'"),
        ({"selection": 0.0}, "got 0.0"),
        ({"selection": 1.5}, "got 1.5"),
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"batch_size": True}, "batch_size must be a positive integer, got True"),
        ({"learning_rate": -1.0}, "got -1.0"),
        ({"dispersion_weight": float("nan")}, "got nan"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message, classifier):
    with pytest.raises(ValueError, match=message):
        TestTimeTuner(classifier, **arguments)


def test_models_that_are_no_classifiers_are_refused(clip):
    with pytest.raises(TypeError, match="needs a classifier"):
        TestTimeTuner(clip)
