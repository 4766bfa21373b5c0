"""The two places behind the towers where adapters can act, with another module in them."""

import torch
from cases import new_classifier

from clip_prompt_peft.heads import ClassHead, ImageHead


class Doubled(ImageHead):
    def forward(self, image_embeds):
        return torch.cat([image_embeds, 2 * image_embeds], dim=1)


class Given(ClassHead):
    """Class embeddings that do not come from the text tower, and a bonus for the first class."""

    def __init__(self, class_embeds):
        super().__init__()
        self.given = class_embeds

    def class_embeds(self, class_names, encode):
        return self.given[: len(class_names)]

    def forward(self, image_embeds, logits, class_names):
        bonus = torch.tensor([name == class_names[0] for name in class_names])
        return logits + bonus


def test_heads_hold_no_tensors_and_stay_out_of_the_plain_model():
    classifier = new_classifier()
    assert not list(classifier.image_head.state_dict()) and not list(classifier.class_head.state_dict())
    plain = classifier.to_base()
    assert "image_head" not in dict(plain.named_children()) and "class_head" not in dict(plain.named_children())
    assert isinstance(type(classifier).from_base(plain, tokenizer=classifier.tokenizer).class_head, ClassHead)


def test_image_embeds_and_class_embeds_of_heads_make_the_logits():
    classifier, width = new_classifier(), new_classifier().embed_width
    image_embeds = torch.randn(3, width)
    class_embeds = torch.nn.functional.normalize(torch.randn(len(classifier.class_names), 2 * width), dim=1)
    classifier.image_head, classifier.class_head = Doubled(), Given(class_embeds)
    doubled = torch.nn.functional.normalize(torch.cat([image_embeds, 2 * image_embeds], dim=1), dim=1)
    expected = classifier.logit_scale.exp() * doubled @ class_embeds.T
    expected[:, 0] += 1
    torch.testing.assert_close(classifier(image_embeds=image_embeds).logits, expected)
    torch.testing.assert_close(classifier.get_class_embeds(), class_embeds)
