"""A pytest plugin that makes torch believe in a card: `PYTHONPATH=tests/helpers pytest -p card_in_sight FILES`.

Whoever asks whether there is a card, and would compute on it, fails, with or without a card in the machine. Trainer
and pipelines of transformers do, so that tests with these fail here; `conftest.py` hides cards from them.
"""

import torch


torch.cuda.is_available = lambda: True
