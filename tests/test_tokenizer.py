"""Tokens are those of transformers' CLIPTokenizer, whatever the prompt and however the special tokens are
written down.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from safelight.engine.tokenizer import MAX_CHARACTERS, PromptTokenizer, _unseen_inside
from safelight.errors import BundleError
from safelight.manifest import Tokens

WINDOW = 32
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def entry(text: str, *, normalized: bool) -> dict:
    """A special token in the long form, as save_pretrained writes it."""
    edges = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": text, "normalized": normalized, "special": True, **edges}


def written(text: str) -> dict:
    return {"__type": "AddedToken"} | {
        k: v for k, v in entry(text, normalized=True).items() if k != "special"
    }


# changes of tokenizer_config.json, and special_tokens_map.json where there is one
FORMS = {
    "plain": ({}, {}),
    "pad !": ({"pad_token": "!"}, {"pad_token": "!"}),
    "pad ! in the map alone, as SD2 has it": ({}, {"pad_token": "!"}),
    "objects": ({"bos_token": written(BOS), "eos_token": written(EOS), "unk_token": written(EOS)}, {}),
    "names nothing": (dict.fromkeys(NAMES), None),
    "listed": (
        {
            "pad_token": "!",
            "added_tokens_decoder": {
                "718": entry(BOS, normalized=True),
                "719": entry(EOS, normalized=True),
                "0": entry("!", normalized=False),
                "721": entry("<b>", normalized=False),
                "720": entry("<A>", normalized=True),
            },
        },
        {"pad_token": EOS},
    ),
}


@pytest.fixture(scope="module", params=FORMS, ids=str)
def pair(request, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """The tokenizer and transformers' own, on the same files."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    shutil.copytree(tiny_model / "tokenizer", folder)
    changes, special = FORMS[request.param]
    rewrite(folder, **changes)
    (folder / "special_tokens_map.json").unlink()
    if special is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    theirs = CLIPTokenizer.from_pretrained(folder)
    return PromptTokenizer(folder, Tokens(WINDOW, 718, 719, theirs.pad_token_id)), theirs


def rewrite(folder: Path, **changes) -> None:
    """Change tokenizer_config.json; a None takes the key out."""
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


PIECES = st.sampled_from(
    [
        "a",
        "red star",
        "!",
        "!!",
        EOS,
        BOS,
        "<|ENDOFTEXT|>",
        "<|endoftext|",
        " ",
        "\t\n",
        "'s",
        "'LL",
        "<A>",
        "<a>",
    ]
    + [
        "<b>",
        "é",
        "e\u0301",
        "ẛ̣",
        "İ",
        "ǅ",
        "ﬁ",
        "½",
        "①",
        "中",
        "👩‍👩‍👧",
        "\u200d",
        "\ufeff",
        "\x00",
        "</w>",
        "...",
    ]
)
PROMPTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=40).map("".join))


@settings(max_examples=150, deadline=None)
@example("")
@example(" \t\n\u2003 ")
@example(EOS)
@example(f"a star{EOS}{EOS}")
@example(f"{BOS}a")
@example("!a! !!")
@example("it's we'll YOU'VE i'd")
@example("e\u0301 is \u00e9")
@example("👩‍👩‍👧🏽 a star")
@example("1234 ½ ①")
@given(text=PROMPTS)
def test_ids_are_those_of_transformers(pair, text: str) -> None:
    ours, theirs = pair
    assume(_unseen_inside(text) is None)
    ids, truncated = ours.encode(text)
    wanted = theirs(text, padding="max_length", truncation=True, max_length=WINDOW)["input_ids"]
    assert ids.dtype == np.int64 and ids.tolist() == wanted
    assert truncated == max(0, len(theirs(text)["input_ids"]) - WINDOW)


@pytest.mark.parametrize("count", [1, WINDOW - 3, WINDOW - 2, WINDOW - 1, WINDOW, 500])
def test_tokens_past_the_window_are_counted(pair, count: int) -> None:
    ids, truncated = pair[0].encode("star " * count)
    kept = min(count, WINDOW - 2)
    assert truncated == count - kept
    assert ids[0] == 718 and ids[kept + 1] == 719 and len(set(ids[1 : kept + 1])) == 1
    assert (ids[kept + 2 :] == pair[1].pad_token_id).all()


def test_what_is_no_prompt_is_refused(pair) -> None:
    ours = pair[0]
    assert ours.encode("x" * MAX_CHARACTERS)[1] > 0
    with pytest.raises(ValueError, match=f"at most {MAX_CHARACTERS} characters; got {MAX_CHARACTERS + 1}"):
        ours.encode("x" * (MAX_CHARACTERS + 1))
    for text, at in (("\ud83d", 0), ("ab\udc00c", 2)):
        with pytest.raises(ValueError, match=f"lone surrogate at {at}"):
            ours.encode(text)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("a yellow st\u200bar", 11),
        ("a yellow st\u200d\u00adar", 11),
        ("st\x0bar", 2),  # white space here, nothing elsewhere
        ("$\u2060tar", 1),
        (
            "a yellow star".encode("utf-16-le").decode(),
            5,
        ),  # U+0000 after every letter; those before it stand beside spaces
        ("x\ue000y", 1),
        ("a yellow st\ufffdar", 11),  # what bytes that are no text were decoded to
        ("st\u034far", 2),
        ("st\ufe0far", 2),
        ("s\u0323\u200b\u0307tar", 2),
        ("a circle <\u200b|endoftext|> x", 10),
        ("a circle <|EndOfText|\u200b> x", 21),
    ],
)
def test_a_word_that_some_tokenizers_would_read_otherwise_is_refused(pair, text: str, at: int) -> None:
    with pytest.raises(ValueError, match=f"inside of a word, at {at}, which some"):
        pair[0].encode(text)


@pytest.mark.parametrize(
    "text",
    [
        "👩\u200d👩\u200d👧 a star",
        "❤\ufe0f\u200d🔥",
        "\ufeffa star",
        "a\u200b star",
        "1\ufe0f\u20e3 ❤\ufe0f",
        "a\tstar\r\nred",
        "é ½",
    ],
)
def test_unseen_characters_beside_words_are_read(pair, text: str) -> None:
    assert len(pair[0].encode(text)[0]) == WINDOW


def no_vocabulary(folder: Path) -> None:
    (folder / "vocab.json").write_text("{")


def no_merges(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\nno such pieces\n")


def absent(folder: Path) -> None:
    (folder / "vocab.json").unlink()


def no_configuration(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"bos_token": 1, "bos_token": 2}')


def odd_token(folder: Path) -> None:
    rewrite(folder, eos_token=7)


def token_without_content(folder: Path) -> None:
    rewrite(folder, eos_token={"lstrip": True})


def odd_list(folder: Path) -> None:
    rewrite(folder, added_tokens_decoder=["!"])


def small_vocabulary(folder: Path) -> None:
    ids = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({text: at for text, at in ids.items() if at < 719}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    rewrite(folder, eos_token="!", pad_token="!", unk_token="!")


def other_end(folder: Path) -> None:
    ids = json.loads((folder / "vocab.json").read_text())
    ids[BOS], ids[EOS] = ids[EOS], ids[BOS]
    (folder / "vocab.json").write_text(json.dumps(ids))


def other_pad(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))


@pytest.mark.parametrize(
    "broken",
    [no_vocabulary, no_merges, absent, no_configuration, odd_token, token_without_content, odd_list]
    + [small_vocabulary, other_end, other_pad],
)
def test_files_that_do_not_fit_are_refused(tiny_model: Path, tmp_path: Path, broken) -> None:
    folder = Path(shutil.copytree(tiny_model / "tokenizer", tmp_path / "tokenizer"))
    tokens = Tokens(WINDOW, 718, 719, 719)
    (folder / "special_tokens_map.json").unlink()
    PromptTokenizer(folder, tokens)
    broken(folder)
    with pytest.raises(BundleError, match="/tokenizer"):
        PromptTokenizer(folder, tokens)
