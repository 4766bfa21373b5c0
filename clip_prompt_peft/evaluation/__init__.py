"""What a tuned classifier is worth, in numbers, pictures and words.

Nothing is imported here, so that `import clip_prompt_peft` loads neither `datasets` nor `evaluate`.
"""
