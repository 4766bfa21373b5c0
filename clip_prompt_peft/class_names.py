"""How class names look: characters that nobody sees, and names that look the same."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Mapping, Sequence


JOINERS = "\u200c\u200d"  # between letters of some scripts, and in emoji
BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs without ink
# Letters of other scripts that look like Latin ones.
LOOKALIKES = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425"
    "\u0406\u0408\u0405\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf",
    "aeopcyxijshdABEKMHOPCTYXIJSABEZHIKMNOPTYXo",
)
MAX_SHOWN = 5


def invisible_characters(name: str) -> list[str]:
    """
    Returns the characters of a name that nobody sees, such as a space of no width, a soft hyphen or a byte order mark.

    White space does not count, nor do joiners and selectors that belong to a letter or an emoji beside them.
    """
    return [character for place, character in enumerate(name) if _is_invisible(name, place)]


def without_invisible(name: str) -> str:
    """Returns a name without its [`invisible_characters`]."""
    return "".join(character for place, character in enumerate(name) if not _is_invisible(name, place))


def _is_invisible(name: str, place: int) -> bool:
    character = name[place]
    if character.isascii() and character.isprintable():
        return False
    before, after = name[:place][-1:], name[place + 1 :][:1]
    if character in JOINERS:
        return not before or not after or (before.isascii() and after.isascii())
    if "\ufe00" <= character <= "\ufe0f":  # how the character in front is drawn; also of digits, in keycaps
        return not before or before.isalpha() and before.isascii()
    if "\U000e0020" <= character <= "\U000e007f":  # of flags
        return not before or before.isascii()
    return character in BLANKS or (unicodedata.category(character) in ("Cf", "Cc") and not character.isspace())


def describe_invisible(found: Mapping[str, Sequence[str]]) -> str:
    """Returns names with the numbers of their invisible characters, for messages."""
    shown = [
        f"{ascii(name)} ({', '.join(f'U+{ord(character):04X}' for character in dict.fromkeys(characters))})"
        for name, characters in list(found.items())[:MAX_SHOWN]
    ]
    return ", ".join(shown) + (f", ... ({len(found)} in all)" if len(found) > MAX_SHOWN else "")


def warn_of_looks(class_names: Sequence[str]) -> None:
    """Warns of names with invisible characters, and of names that look the same."""
    if all(map(str.isascii, class_names)) and all(map(str.isprintable, class_names)):
        return
    invisible = {name: found for name in class_names if (found := invisible_characters(name))}
    if invisible:
        warnings.warn(
            "Class names hold characters that nobody sees, but that the model reads: "
            f"{describe_invisible(invisible)}. Remove them, for example with clip_prompt_peft.data.clean_class_name.",
            stacklevel=3,
        )
    first_of: dict[str, str] = {}
    for name in class_names:
        other = first_of.setdefault(_look(name), name)
        if other is not name:
            warnings.warn(
                f"Two class names look the same: {ascii(other)} and {ascii(name)}. If they are one class, give it one "
                "name; otherwise rename one.",
                stacklevel=3,
            )


def _look(name: str) -> str:
    """Returns what names that look the same have in common."""
    plain = unicodedata.normalize("NFKC", without_invisible(name).translate(LOOKALIKES))
    return " ".join(plain.split())
