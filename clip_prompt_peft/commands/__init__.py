"""The commands of the package, one module with a `main()` each; `clip_prompt_cli` declares their arguments."""
