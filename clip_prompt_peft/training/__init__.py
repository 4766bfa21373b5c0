"""Training of prompts with the Trainer: recipes of the papers, callbacks, checkpoints."""
