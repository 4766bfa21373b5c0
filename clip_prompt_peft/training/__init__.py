"""Training with the Trainer: recipes of the papers, callbacks, the ProGrad step, and checkpoints."""
