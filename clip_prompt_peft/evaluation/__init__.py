"""Metrics, plots, reports and model cards for trained classifiers.

This module imports nothing, so that `import clip_prompt_peft` loads neither `datasets` nor `evaluate`.
"""
