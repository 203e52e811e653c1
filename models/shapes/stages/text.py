"""The tokenizer, trained on the caption grammar, and the text encoder, trained to read it. CLIP's format and
classes.
"""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from safelight.models.shapes.stages.loop import Plan, fit
from safelight.models.shapes.stages.pictures import Pictures

WINDOW = 32  # tokens that the model reads
WIDTH = 64
VOCABULARY = 720
PLAN = Plan(steps=3000, lr=1e-3, ema=0.998)
BATCH = 128
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's format: lower case, `</w>` at a word's end, begin and end tokens
    last.
    """
    pair = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    pair.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    pair.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pair.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    pair.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(pair.to_str())["model"]["merges"]]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=WINDOW)


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids int64 (N, 32), cut and padded to the window."""
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=WINDOW, return_tensors="pt")
    ids: Tensor = batch["input_ids"]
    return ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder of the shipped size."""
    torch.manual_seed(4)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=WINDOW,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def open_tokenizer(work: Path, captions: list[str]) -> CLIPTokenizer:
    """Train the tokenizer, or open the one that this run trained before."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        train_tokenizer(captions).save_pretrained(folder)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def train_text(work: Path, tokenizer: CLIPTokenizer, pictures: Pictures) -> CLIPTextModel:
    """Train, or load, the text encoder on what its captions say, before it meets a picture (the role of
    CLIP's training).

    A linear head on the end token names the (kind, colour) pairs; it is thrown away. The generator's training
    goes on from here, so that it need not find out what words mean from noise.
    """
    text_encoder = build_text_encoder(tokenizer)
    torch.manual_seed(4)
    head = nn.Linear(WIDTH, pictures.content.shape[1])
    ids = encode(tokenizer, pictures.captions)

    def loss_of(step: int) -> dict[str, Tensor]:
        rows = torch.from_numpy(pictures.pick(4, step, BATCH))
        logits = head(text_encoder(ids[rows]).pooler_output)
        return {"loss": 10 * nn.functional.binary_cross_entropy_with_logits(logits, pictures.content[rows])}

    fit("text", work, nn.ModuleDict({"text_encoder": text_encoder, "head": head}), loss_of, PLAN)
    return text_encoder
