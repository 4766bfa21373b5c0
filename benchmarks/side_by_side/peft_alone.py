"""The nearest that peft offers by itself: the words of the template trained as tokens, in a loop of one's own."""

import sys

import torch
from peft import TrainableTokensConfig, get_peft_model
from pictures import BATCH_SIZE, DEVICE, EPOCHS, LEARNING_RATE, SEED, TEMPLATE, TINY_CLIP, load
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel


def collate(examples):
    pixel_values = processor([e["image"].convert("RGB") for e in examples], return_tensors="pt")["pixel_values"]
    return pixel_values.to(DEVICE), torch.tensor([e["label"] for e in examples], device=DEVICE)


def logits_of(pixel_values):
    return model(pixel_values=pixel_values, **prompts).logits_per_image


torch.manual_seed(SEED)
train, test, class_names = load()
processor, tokenizer = CLIPImageProcessor.from_pretrained(TINY_CLIP), AutoTokenizer.from_pretrained(TINY_CLIP)
prompts = tokenizer([TEMPLATE.format(name) for name in class_names], padding=True, return_tensors="pt").to(DEVICE)
words = sorted(set(tokenizer(TEMPLATE.split("{}")[0], add_special_tokens=False)["input_ids"]))
config = TrainableTokensConfig(target_modules=["token_embedding"], token_indices=words)
model = get_peft_model(CLIPModel.from_pretrained(TINY_CLIP).to(DEVICE), config)
loader = DataLoader(train, BATCH_SIZE, shuffle=True, collate_fn=collate)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
for _ in range(EPOCHS):
    for pixel_values, labels in loader:
        loss = nn.functional.cross_entropy(logits_of(pixel_values), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
correct = 0
with torch.no_grad():
    for pixel_values, labels in DataLoader(test, 64, collate_fn=collate):
        correct += (logits_of(pixel_values).argmax(dim=1) == labels).sum().item()
model.save_pretrained(sys.argv[1])
print(correct / len(test))
