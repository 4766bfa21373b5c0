"""`python -m clip_prompt_peft train` is `clip-prompt train`."""

from clip_prompt_cli.main import main


if __name__ == "__main__":
    main()
