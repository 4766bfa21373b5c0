"""Where this package is published and how to install it, as messages, model cards, metadata and the site say it."""

from importlib.metadata import PackageNotFoundError, requires


# The one place that says where the repository is, such as "https://github.com/OWNER/clip_prompt_peft". Without an
# address, the metadata have no URLs, and README's links to files are left out there.
REPOSITORY = ""


def packages_of(extra: str) -> list[str]:
    """Returns the requirements of an extra as arguments of pip, or none if the package is not installed."""
    try:
        needed = requires("clip_prompt_peft") or []
    except PackageNotFoundError:  # a clone on PYTHONPATH
        return []
    parts = (requirement.partition(";") for requirement in needed)  # such as: gradio>=6.0; extra == "demo"
    return [f'"{name.strip()}"' for name, _, marker in parts if marker.strip() == f'extra == "{extra}"']


def how_to_install(extra: str = "") -> str:
    """Returns what to do to install the package or, if it is installed, the packages of an extra of setup.cfg.

    These are named one by one, which works wherever this package was installed from.
    """
    if extra and (packages := packages_of(extra)):
        return f"pip install {' '.join(packages)}"
    extras = f"[{extra}]" if extra else ""
    if REPOSITORY:
        return f'pip install "clip_prompt_peft{extras} @ git+{REPOSITORY}"'
    return f'in a clone of clip_prompt_peft: pip install -e ".{extras}"'
