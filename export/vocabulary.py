"""A made-up byte-pair vocabulary in CLIP's format, of any size: reads any text, means nothing.

Bytes, bytes at a word's end, the pieces of a few words, then fillers up to the size, then the begin and end
tokens; the order of the two files is that of CLIP's tokenizer.
"""

import itertools
import json
from pathlib import Path

from safelight.errors import ExportError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_WORDS = [
    "a",
    "an",
    "the",
    "red",
    "green",
    "blue",
    "yellow",
    "circle",
    "square",
    "star",
    "shape",
    "picture",
    "of",
    "on",
    "in",
    "with",
    "and",
    "photo",
]
_END = "</w>"


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for the bytes, in the order of CLIP's vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [chr(256 + index) for index in range(256 - len(plain))]
    return [chr(byte) for byte in plain] + other


def make(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer of `size` tokens. Raises ExportError where the bytes alone do not
    fit.
    """
    letters = byte_letters()
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + _END]
        while len(pieces) > 1:
            merges.setdefault((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    fillers = itertools.chain(
        itertools.product(letters, letters), itertools.product(letters, (letter + _END for letter in letters))
    )
    room = size - 2 - 2 * len(letters)
    if room < len(merges):
        raise ExportError(
            f"a vocabulary needs at least {2 + 2 * len(letters) + len(merges)} tokens; got {size}"
        )
    for pair in fillers:
        if len(merges) == room:
            break
        merges.setdefault(pair)
    tokens = [*letters, *(letter + _END for letter in letters), *("".join(pair) for pair in merges), BOS, EOS]
    return {token: index for index, token in enumerate(tokens)}, list(merges)


def write_tokenizer(folder: Path, size: int, *, window: int, pad: str | None) -> int:
    """Write the four files of a CLIP tokenizer; returns the id of the token that fills the window."""
    vocabulary, merges = make(size)
    folder.mkdir(parents=True)
    filler = pad if pad is not None else EOS
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": filler}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": window,
        "do_lower_case": True,
        **special,
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    return vocabulary[filler]
