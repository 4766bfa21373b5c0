"""The commands of the package, one module each: `python -m clip_prompt_peft.commands.train`."""
