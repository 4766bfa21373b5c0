"""Prompt tuning by hand on a CLIPModel, in the manner of CoOp's research code."""

import sys

import torch
from pictures import BATCH_SIZE, DEVICE, EPOCHS, LEARNING_RATE, SEED, TEMPLATE, TINY_CLIP, load
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
from transformers.masking_utils import create_causal_mask


class PromptLearner(nn.Module):
    def __init__(self, clip, tokenizer, class_names):
        super().__init__()
        texts = [TEMPLATE.format(name) for name in class_names]
        self.input_ids = tokenizer(texts, padding="max_length", return_tensors="pt")["input_ids"].to(DEVICE)  # (C, 77)
        self.ends = (self.input_ids == tokenizer.eos_token_id).int().argmax(dim=1)
        num_vectors = len(tokenizer(TEMPLATE.split("{}")[0], add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            embeds = clip.text_model.embeddings.token_embedding(self.input_ids)
        self.context = nn.Parameter(embeds[0, 1 : 1 + num_vectors].clone())
        self.register_buffer("prefix", embeds[:, :1])
        self.register_buffer("suffix", embeds[:, 1 + num_vectors :])

    def forward(self):
        context = self.context.expand(len(self.prefix), -1, -1)
        return torch.cat([self.prefix, context, self.suffix], dim=1)


class CustomCLIP(nn.Module):
    def __init__(self, clip, prompt_learner):
        super().__init__()
        self.clip, self.prompt_learner = clip.requires_grad_(False), prompt_learner

    def encode_text(self):
        text = self.clip.text_model
        states = text.embeddings(inputs_embeds=self.prompt_learner())
        mask = create_causal_mask(config=text.config, inputs_embeds=states, attention_mask=None, past_key_values=None)
        states = text.encoder(inputs_embeds=states, attention_mask=mask, is_causal=True).last_hidden_state
        states = text.final_layer_norm(states)
        return self.clip.text_projection(states[torch.arange(len(states)), self.prompt_learner.ends])

    def forward(self, pixel_values):
        image_embeds = nn.functional.normalize(self.clip.get_image_features(pixel_values).pooler_output, dim=-1)
        text_embeds = nn.functional.normalize(self.encode_text(), dim=-1)
        return self.clip.logit_scale.exp() * image_embeds @ text_embeds.T


def collate(examples):
    pixel_values = processor([e["image"].convert("RGB") for e in examples], return_tensors="pt")["pixel_values"]
    return pixel_values.to(DEVICE), torch.tensor([e["label"] for e in examples], device=DEVICE)


torch.manual_seed(SEED)
train, test, class_names = load()
clip = CLIPModel.from_pretrained(TINY_CLIP).to(DEVICE)
processor, tokenizer = CLIPImageProcessor.from_pretrained(TINY_CLIP), AutoTokenizer.from_pretrained(TINY_CLIP)
model = CustomCLIP(clip, PromptLearner(clip, tokenizer, class_names))
loader = DataLoader(train, BATCH_SIZE, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW([model.prompt_learner.context], lr=LEARNING_RATE, weight_decay=0)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
for _ in range(EPOCHS):
    for pixel_values, labels in loader:
        loss = nn.functional.cross_entropy(model(pixel_values), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
correct = 0
with torch.no_grad():
    for pixel_values, labels in DataLoader(test, 64, collate_fn=collate):
        correct += (model(pixel_values).argmax(dim=1) == labels).sum().item()
torch.save({"context": model.prompt_learner.context.data}, f"{sys.argv[1]}/prompt_learner.pt")
print(correct / len(test))
