"""The same with clip_prompt_peft and the Trainer."""

import sys

from peft import get_peft_model
from pictures import BATCH_SIZE, DEVICE, EPOCHS, LEARNING_RATE, SEED, TEMPLATE, TINY_CLIP, load
from transformers import CLIPImageProcessor, Trainer, TrainingArguments

from clip_prompt_peft import CLIPForPromptClassification, CLIPPromptTuningConfig
from clip_prompt_peft.data import cache_image_embeds
from clip_prompt_peft.evaluation.metrics import compute_metrics


train, test, class_names = load()
processor = CLIPImageProcessor.from_pretrained(TINY_CLIP)
classifier = CLIPForPromptClassification.from_pretrained(TINY_CLIP, class_names=class_names).to(DEVICE)
model = get_peft_model(classifier, CLIPPromptTuningConfig(prompt_template=TEMPLATE))
train, test = (cache_image_embeds(split, model, processor) for split in (train, test))
args = TrainingArguments(
    sys.argv[1],
    num_train_epochs=EPOCHS,
    per_device_train_batch_size=BATCH_SIZE,
    learning_rate=LEARNING_RATE,
    lr_scheduler_type="cosine",
    save_strategy="no",
    seed=SEED,
    report_to="none",
)
trainer = Trainer(model, args, train_dataset=train, compute_metrics=compute_metrics)
trainer.train()
model.save_pretrained(sys.argv[1])
print(trainer.evaluate(test)["eval_accuracy"])
