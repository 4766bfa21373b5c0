"""Where this package is published and how to install it, as messages, model cards, metadata and the site say it."""

# The one place that says where the repository is, such as "https://github.com/OWNER/clip_prompt_peft". Without an
# address, the metadata have no URLs, and README's links to files are left out there.
REPOSITORY = ""


def how_to_install(extra: str = "") -> str:
    """Returns what to do to install the package, with the packages of an optional feature of setup.cfg."""
    extras = f"[{extra}]" if extra else ""
    if REPOSITORY:
        return f'pip install "clip_prompt_peft{extras} @ git+{REPOSITORY}"'
    return f'in a clone of clip_prompt_peft: pip install -e ".{extras}"'
