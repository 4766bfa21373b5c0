"""What an adapter learned and how well it does, as one HTML file (`pip install "clip_prompt_peft[report]"`)."""

from .html import write_report


__all__ = ["write_report"]
