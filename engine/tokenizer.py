"""CLIP's tokenizer from a bundle's files, without transformers: text to the ids that the model reads.

The same normalisation, split and byte-pair merges as transformers' `CLIPTokenizer`, special tokens inside a
prompt included, since what is screened must be what the model would read.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from safelight.containment import read_json
from safelight.errors import BundleError
from safelight.manifest import Tokens

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
MAX_CHARACTERS = 32_000  # far past any window; what lies beyond cannot reach the model


class PromptTokenizer:
    """Text to a window of ids."""

    def __init__(self, folder: Path, tokens: Tokens) -> None:
        """`folder` holds vocab.json, merges.txt and tokenizer_config.json. Raises BundleError where they do
        not fit.
        """
        self._tokens = tokens
        config = read_json(folder / "tokenizer_config.json")
        try:
            special = [_added(config[name]) for name in _SPECIAL if config.get(name) is not None]
            unknown = config.get("unk_token")
            model = models.BPE.from_file(
                str(folder / "vocab.json"),
                str(folder / "merges.txt"),
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                fuse_unk=False,
                unk_token=_added(unknown).content if unknown is not None else None,
            )
        except Exception as fault:  # tokenizers raises bare Exceptions
            raise BundleError(
                f"{folder}: the vocabulary cannot be read ({fault}); export it again"
            ) from fault
        self._tokenizer: Any = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self._tokenizer.add_special_tokens(special)
        expected = {"bos_token": tokens.bos, "eos_token": tokens.eos, "pad_token": tokens.pad}
        named = dict(zip([name for name in _SPECIAL if config.get(name) is not None], special, strict=True))
        for name, token in expected.items():
            found = self._tokenizer.token_to_id(named[name].content) if name in named else token
            if found != token or self._tokenizer.id_to_token(token) is None:
                raise BundleError(
                    f"{folder}: {name} must have the id {token} of the manifest; got {found}; export it again"
                )

    def encode(self, text: str) -> tuple[NDArray[np.int64], int]:
        """Ids int64 (L,), begun, ended and filled up to the window, and how many tokens did not fit.

        Raises ValueError for text over 32,000 characters, or that is not valid Unicode.
        """
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"a prompt has at most {MAX_CHARACTERS} characters; got {len(text)}; shorten it")
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            raise ValueError(
                f"a prompt must be valid Unicode text; got a lone surrogate at {fault.start}"
            ) from None
        found = self._tokenizer.encode(text, add_special_tokens=False).ids
        room = self._tokens.window - 2
        kept = found[:room]
        ids = np.full(self._tokens.window, self._tokens.pad, dtype=np.int64)
        ids[: len(kept) + 2] = [self._tokens.bos, *kept, self._tokens.eos]
        return ids, len(found) - len(kept)


def _added(entry: Any) -> AddedToken:
    """A special token as written in a configuration: its text, or an object with its settings."""
    if isinstance(entry, str):
        return AddedToken(entry, normalized=False, special=True)
    settings = {
        name: entry[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry
    }
    return AddedToken(entry["content"], special=True, **settings)
