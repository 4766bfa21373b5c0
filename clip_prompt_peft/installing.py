"""How to install this package, as messages and model cards say it."""

# The one place to change when the package is published, to 'pip install "clip_prompt_peft{extras}"', or with the
# address of the repository, to 'pip install "clip_prompt_peft{extras} @ git+https://..."'.
INSTALL = 'in a clone of clip_prompt_peft: pip install -e ".{extras}"'


def how_to_install(extra: str = "") -> str:
    """Returns what to do to install the package, with the packages of an optional feature of setup.cfg."""
    return INSTALL.format(extras=f"[{extra}]" if extra else "")
