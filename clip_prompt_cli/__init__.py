"""The command line: `clip-prompt NAME`, its help, mistakes in flags and completion by Tab.

Nothing here imports `clip_prompt_peft`, torch or transformers, which take seconds: only a command that runs does.
The declarations of the arguments are here, too, and the commands in `clip_prompt_peft/commands` parse with them.
"""
