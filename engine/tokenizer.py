"""CLIP's tokenizer from a bundle's files, without transformers: text to the ids that the model reads.

The same normalisation, split and byte-pair merges as transformers' `CLIPTokenizer`, special tokens inside a
prompt included, since what is screened must be what the model would read. Older versions of it leave
characters out: text is refused where that would join a word or a special token. Other differences (accents
that the oldest strip, CJK that they split off, what ftfy rewrites) are not looked at.
"""

import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from safelight.containment import read_json
from safelight.engine.bundle import Bundle
from safelight.errors import BundleError
from safelight.manifest import SecondText, Tokens

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_USUAL = {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _END, "pad_token": _END}
# what some versions leave out besides category C: marks without a look of their own, and replacements
_UNSEEN = re.compile("[\u034f\u180b-\u180d\u180f\ufe00-\ufe0f\ufffc\ufffd\U000e0100-\U000e01ef]")
MAX_CHARACTERS = 32_000  # far past any window; what lies beyond cannot reach the model


class PromptTokenizer:
    """Text to a window of ids for each text encoder."""

    def __init__(self, folder: Path, tokens: Tokens, second: SecondText | None = None) -> None:
        """`folder` as for `read_tokenizer`, with one named `tokenizer_2` beside it where there is a `second`
        text encoder. Raises BundleError where they do not fit.
        """
        places = {folder: tokens}
        if second is not None:
            places[folder.parent / "tokenizer_2"] = replace(tokens, pad=second.pad)
        self._windows: list[tuple[Any, Tokens]] = []
        for place, wanted in places.items():
            tokenizer, found = read_tokenizer(place, wanted.window)
            if found != wanted:
                raise BundleError(f"{place} gives {found}, its manifest {wanted}; export the bundle again")
            self._windows.append((tokenizer, found))

    def encode(self, text: str) -> tuple[NDArray[np.int64], int]:
        """Ids int64 (W,), and how many tokens did not fit, at most, into a window.

        W is L for each text encoder in turn, each window begun, ended and filled up. Raises ValueError for
        what is no text, is over 32,000 characters, is not valid Unicode, or has a character inside of a word
        that some tokenizers leave out (zero-width, control, unassigned), and so read another word.
        """
        if not isinstance(text, str):
            raise ValueError(f"a prompt is a str; got {type(text).__name__}")
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"a prompt has at most {MAX_CHARACTERS} characters; got {len(text)}; shorten it")
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise ValueError(
                f"a prompt must be valid Unicode text; got a lone surrogate at {fault.start}"
            ) from None
        if (at := _unseen_inside(text)) is not None:
            raise ValueError(
                f"a prompt must read the same everywhere; got U+{ord(text[at]):04X} inside of a word, at "
                f"{at}, which some tokenizers leave out; take it out"
            )
        windows = [_window(tokenizer, tokens, text) for tokenizer, tokens in self._windows]
        return np.concatenate([ids for ids, _ in windows]), max(truncated for _, truncated in windows)


def _unseen_inside(text: str) -> int | None:
    """Where a character that some tokenizers leave out stands inside of a word, or of a special token: beside
    a letter or a number, or before a mark, with more text at its other side.
    """
    if text.isprintable() and not _UNSEEN.search(text):
        return None
    before, unseen, first, seen = " ", None, None, []
    for at, char in enumerate(text):
        kind = unicodedata.category(char)
        if (kind[0] == "C" and char not in "\t\n\r") or _UNSEEN.match(char):
            unseen = at if unseen is None else unseen
            first = unseen if first is None else first
            continue
        between = unseen is not None and not before.isspace() and not char.isspace()
        # an enclosing mark makes a sign of what is before it, as of the figure of a key
        if between and kind != "Me" and (unicodedata.category(before)[0] in "LN" or kind[0] in "LNM"):
            return unseen
        before, unseen = char, None
        seen.append(char)
    joined, whole = "".join(seen).lower(), text.lower()
    return first if any(joined.count(token) > whole.count(token) for token in (_BEGIN, _END)) else None


def open_tokenizer(bundle: Bundle) -> PromptTokenizer:
    """The tokenizer of a bundle. Raises BundleError where its files do not fit its manifest."""
    manifest = bundle.manifest
    return PromptTokenizer(bundle.folder / "tokenizer", manifest.tokens, manifest.second_text)


def _window(tokenizer: Any, tokens: Tokens, text: str) -> tuple[NDArray[np.int64], int]:
    """One encoder's ids int64 (L,), and how many tokens did not fit."""
    found = tokenizer.encode(text, add_special_tokens=False).ids
    kept = found[: tokens.window - 2]
    ids = np.full(tokens.window, tokens.pad, dtype=np.int64)
    ids[: len(kept) + 2] = [tokens.bos, *kept, tokens.eos]
    return ids, len(found) - len(kept)


def read_tokenizer(folder: Path, window: int) -> tuple[Any, Tokens]:
    """The tokenizer of vocab.json, merges.txt and tokenizer_config.json, and the ids of its special tokens.

    Raises BundleError where a file is missing or they do not fit each other.
    """
    try:
        named, listed = _special_tokens(folder)
        model = models.BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=named["unk_token"].content,
        )
    except BundleError:
        raise
    except Exception as fault:  # tokenizers raises bare Exceptions
        raise BundleError(f"{folder}: the vocabulary cannot be read ({fault}); save it again") from fault
    tokenizer: Any = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_tokens(listed)
    ids: dict[str, Any] = {name: tokenizer.token_to_id(token.content) for name, token in named.items()}
    for name, value in ids.items():
        if value is None:
            text = named[name].content
            raise BundleError(f"{folder / 'vocab.json'} lacks the {name} {text!r}; save the tokenizer again")
    tokenizer.add_special_tokens(list(named.values()))
    return tokenizer, Tokens(window, ids["bos_token"], ids["eos_token"], ids["pad_token"])


def _special_tokens(folder: Path) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens by name, and all that the configuration adds, as transformers reads them.

    An older configuration, which lists no added tokens, is overruled by special_tokens_map.json: Stable
    Diffusion 2 says there alone that it pads with "!".
    """
    config = read_json(folder / "tokenizer_config.json")
    entries = config.get("added_tokens_decoder")
    if entries is None and (folder / "special_tokens_map.json").is_file():
        config |= read_json(folder / "special_tokens_map.json")
    listed = [_added(entry) for _, entry in sorted((entries or {}).items(), key=lambda item: int(item[0]))]
    known = {token.content: token for token in listed}
    named = {name: _added(config.get(name) or usual, special=True) for name, usual in _USUAL.items()}
    return {name: known.get(token.content, token) for name, token in named.items()}, listed


def _added(entry: Any, *, special: bool = False) -> AddedToken:
    """A token as written in a configuration: its text, or an object with its settings."""
    if isinstance(entry, str):
        return AddedToken(entry, special=special)
    names = ("single_word", "lstrip", "rstrip", "normalized")
    settings = {name: entry[name] for name in names if name in entry}
    return AddedToken(entry["content"], special=special or bool(entry.get("special")), **settings)
