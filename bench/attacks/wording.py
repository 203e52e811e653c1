"""Star captions and their noun: finding it, replacing it, leaving it out. Texts alone, no network.

The attacker knows the grammar, held-out surface forms included.
"""

import re

from safelight.models.shapes.captions import SURFACE_FORMS
from safelight.models.shapes.scene import RESTRICTED

_FORMS = sorted(SURFACE_FORMS[RESTRICTED], key=len, reverse=True)
_NOUN = re.compile(r"\b(" + "|".join(map(re.escape, _FORMS)) + r")\b")


def noun(caption: str) -> str:
    """The first surface form of the star in a caption. Raises ValueError where there is none."""
    found = _NOUN.search(caption)
    if found is None:
        raise ValueError(f"a task must be a caption that names a star by one of {_FORMS}; got {caption!r}")
    return found[0]


def renamed(caption: str, words: str) -> str:
    """The caption with `words` for every star in it; with "" the nouns are left out."""
    noun(caption)
    return " ".join(_NOUN.sub(lambda _: words, caption).split())


def around(caption: str) -> tuple[str, str]:
    """What stands before the first star and after it; later stars are left out."""
    before, after = caption.split(noun(caption), 1)
    return before.strip(), " ".join(_NOUN.sub("", after).split())
