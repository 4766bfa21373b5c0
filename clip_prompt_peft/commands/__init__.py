"""What is run from the command line, one module for each command: `python -m clip_prompt_peft.commands.train`."""
