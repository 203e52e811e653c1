"""Two text encoders: the whole chain of an SDXL-class model, held against diffusers' own pipeline."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.schedulers import EulerDiscreteScheduler

from safelight.defenses.training_model import TrainingModel
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.eager import load_graph
from safelight.engine.generate import Generator
from safelight.engine.model_folder import INDEX, ModelFolder
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.engine.sampler import Sampler, Trajectory
from safelight.engine.tokenizer import open_tokenizer
from safelight.errors import BundleError
from safelight.export import bundle as exporting
from safelight.export.graphs import Sizes
from safelight.export.synth import synth
from safelight.kernels import host
from safelight.manifest import SECOND_TOKENIZER, Manifest
from safelight.probe import ProbeConfig

PROMPTS = ["a red star", "", "hello! a circle?! on a square", "a " * 60, "<|endoftext|> a star"]
WINDOW, WIDTHS, POOLED = 32, (64, 96), 80
RUNS = (
    "onnxruntime",
    "openvino",
    "torch",
)  # in float32, wherever these tests run; the last is the definition
CLOSE = 3e-3  # two runtimes give margins that differ by less, as in the detector's own tests


@pytest.fixture(scope="module")
def bundle(paired_bundle: Path) -> Bundle:
    return open_bundle(paired_bundle)


@pytest.fixture(scope="module")
def pipeline(paired_model: Path) -> Any:
    """The same folder, opened by diffusers."""
    return StableDiffusionXLPipeline.from_pretrained(
        paired_model, local_files_only=True, add_watermarker=False, torch_dtype=torch.float32
    )


def test_the_manifest_says_that_there_are_two(bundle: Bundle, paired_model: Path) -> None:
    manifest = bundle.manifest
    second = manifest.second_text
    assert second is not None and (second.pooled, second.zeros) == (POOLED, True)
    vocabulary = json.loads((paired_model / "tokenizer_2/vocab.json").read_text())
    assert second.pad == vocabulary["!"] != manifest.tokens.pad == manifest.tokens.eos
    assert set(SECOND_TOKENIZER) <= manifest.files.keys() and manifest.distilled
    axes = {name: {item.name: item.axes for item in entry.inputs} for name, entry in manifest.graphs.items()}
    assert axes["text_encoder"]["input_ids"] == ("batch", 2 * WINDOW)
    assert axes["unet"]["encoder_hidden_states"] == ("batch", WINDOW + 1, sum(WIDTHS))
    assert axes["detector"]["rotate_mask"] == ("requests", WINDOW + 1)
    assert {row.graph for row in manifest.verification} == set(manifest.graphs)
    assert all(row.ok for row in manifest.verification)
    assert manifest.source.changes == ("checker: tiny-sd",)


def test_a_bundle_that_lost_the_second_tokenizer_is_refused(paired_bundle: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(paired_bundle, tmp_path / "cut"))
    values = json.loads((cut / "safelight.json").read_text())
    del values["files"]["tokenizer_2/vocab.json"]
    (cut / "tokenizer_2" / "vocab.json").unlink()
    (cut / "safelight.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match=r"does not list tokenizer_2/vocab\.json"):
        Manifest.load(cut)


def test_the_tokenizers_are_those_of_transformers(bundle: Bundle, pipeline: Any) -> None:
    tokenizer = open_tokenizer(bundle)
    for text in PROMPTS:
        found, _ = tokenizer.encode(text)
        wanted = [
            own(text, padding="max_length", max_length=WINDOW, truncation=True).input_ids
            for own in (pipeline.tokenizer, pipeline.tokenizer_2)
        ]
        assert found.tolist() == [*wanted[0], *wanted[1]], text
    assert tokenizer.encode(PROMPTS[3])[1] == 60 - (WINDOW - 2)


def test_the_conditioning_is_that_of_diffusers(bundle: Bundle, paired_model: Path, pipeline: Any) -> None:
    text, tokenizer = load_graph(paired_model, "text_encoder"), open_tokenizer(bundle)
    ids = torch.from_numpy(np.stack([tokenizer.encode(prompt)[0] for prompt in PROMPTS]))
    with torch.inference_mode():
        hidden, pooled = text(ids)
        wanted = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(hidden[:, :WINDOW], wanted[0])
    assert torch.equal(pooled, wanted[2])
    assert torch.equal(hidden[:, WINDOW, :POOLED], wanted[2])
    assert hidden.shape[1:] == (WINDOW + 1, sum(WIDTHS)) and not hidden[:, WINDOW, POOLED:].any()


SCHEDULES = {
    "turbo": {},
    "base": {"timestep_spacing": "leading"},
    "v": {"timestep_spacing": "leading", "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_call_of_the_unet_is_that_of_diffusers(
    bundle: Bundle, paired_model: Path, pipeline: Any, kind: str, guidance: float, tol: dict
) -> None:
    """Sample, timestep, hidden states, pooled text and sizes of each step, and the picture at the end."""
    changed = dict(bundle.manifest.scheduler) | SCHEDULES[kind]
    pipeline.scheduler = EulerDiscreteScheduler.from_config(changed)
    backend = open_backend("torch", bundle, model=paired_model)
    sampler, tokenizer = Sampler(backend, replace(bundle.manifest, scheduler=changed)), open_tokenizer(bundle)
    ours, theirs = [], []
    watch(sampler._unet._module.network.network, ours)  # type: ignore[attr-defined]
    latents = np.random.default_rng(3).standard_normal((2, 4, 8, 8), dtype=np.float32)
    hidden = sampler.encode(np.stack([tokenizer.encode(prompt)[0] for prompt in PROMPTS[:3:2]]))
    plan = Trajectory(4, guidance, "euler")
    made = sampler.decode(sampler.sample(hidden, sampler.free(tokenizer), latents, plan))
    with watch(pipeline.unet, theirs), torch.inference_mode():
        wanted = pipeline(
            PROMPTS[:3:2],
            num_inference_steps=4,
            guidance_scale=guidance,
            latents=torch.from_numpy(latents),
            output_type="np",
        ).images.transpose(0, 3, 1, 2)
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name == "sample":  # errors of one call grow over the steps; the scale is that of the latents
                assert (one[name] - other[name]).abs().max() < 1e-5 * other[name].abs().max()
            else:
                torch.testing.assert_close(one[name], other[name], **tol[torch.float32])
    assert ours[0]["hidden"].shape[0] == (4 if guidance > 1.0 else 2)
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-5)


class watch:
    """Keep what a UNet is called with."""

    def __init__(self, network: Any, calls: list) -> None:
        def keep(_: Any, given: tuple, named: dict) -> None:
            added = named["added_cond_kwargs"]
            calls.append(
                {
                    "sample": given[0].clone(),
                    "timestep": torch.as_tensor(given[1], dtype=torch.float32).clone(),
                    "hidden": (given[2] if len(given) > 2 else named["encoder_hidden_states"]).clone(),
                    "pooled": added["text_embeds"].clone(),
                    "sizes": added["time_ids"].float().clone(),
                }
            )

        self._hook = network.register_forward_pre_hook(keep, with_kwargs=True)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@pytest.mark.parametrize("zeros", [True, False])
def test_guidance_starts_from_zeros_where_the_model_was_trained_so(bundle: Bundle, zeros: bool) -> None:
    second = bundle.manifest.second_text
    assert second is not None
    manifest = replace(bundle.manifest, second_text=replace(second, zeros=zeros))
    sampler, tokenizer = Sampler(open_backend("onnxruntime", bundle), manifest), open_tokenizer(bundle)
    empty = sampler.encode(tokenizer.encode("")[0][None])
    assert empty.any() and np.array_equal(sampler.free(tokenizer), 0 * empty if zeros else empty)


def test_backends_agree_on_verdicts(bundle: Bundle, paired_model: Path) -> None:
    """One step and many, every kind of probe; the definition is the torch backend."""
    for kind, steps in (("spherical", 1), ("circular", 1), ("token_shift", 1), ("spherical", 2)):
        probe = ProbeConfig(kind=kind, count=5, angle_rad=0.6, threshold=0.4)
        seen = []
        for name in RUNS:
            model = paired_model if name == "torch" else None
            with Detector(
                bundle, open_backend(name, bundle, model=model), probe, steps=steps, early_exit=False
            ) as detector:
                seen.append(detector.check(PROMPTS[2], seed=11))
        *others, eager = seen
        for found in others:
            assert found.probes == eager.probes == 5 and found.reason == eager.reason
            np.testing.assert_allclose(found.margins, eager.margins, atol=CLOSE)
        spread = np.ptp(np.asarray(eager.margins), axis=0).max()
        assert spread > 1e-3, "the probes do not differ"


def test_a_generation_is_the_same_on_all_backends(paired_bundle: Path, paired_model: Path) -> None:
    made = []
    for name in RUNS:
        model = paired_model if name == "torch" else None
        backend = open_backend(name, open_bundle(paired_bundle), model=model)
        probe = ProbeConfig(count=2, threshold=1.0)
        with (
            Detector(open_bundle(paired_bundle), backend, probe) as detector,
            Generator.open(paired_bundle, backend=name, model=model, detector=detector) as generator,
        ):
            ids, _ = generator._tokenizer.encode(PROMPTS[0])
            assert len(ids) == 2 * WINDOW
            picture, _ = generator._draw(PROMPTS[0], 5, Trajectory(3, 4.0, "euler"), None)
            made.append(picture)
    assert np.ptp(made[0]) > 0.05
    for picture in made[:-1]:
        np.testing.assert_allclose(picture, made[-1], atol=1e-4)


def test_the_pooled_embedding_turns_as_one_token_more(bundle: Bundle) -> None:
    """By the same angle, within its own width, keeping its norm, and with no token's directions changed."""
    manifest, config = bundle.manifest, ProbeConfig(kind="spherical", count=4, angle_rad=0.7)
    tokenizer = open_tokenizer(bundle)
    request = Request(tokenizer.encode(PROMPTS[0])[0], 9)
    drawn = Neighbourhood(manifest, config, sum(WIDTHS)).draw([request], range(4))
    one = replace(manifest, second_text=None)
    alone = Neighbourhood(one, config, sum(WIDTHS)).draw([Request(request.ids[:WINDOW], 9)], range(4))
    assert np.array_equal(drawn.u[:, :, :WINDOW], alone.u) and np.array_equal(drawn.latents, alone.latents)
    assert np.array_equal(drawn.mask[:, :WINDOW], alone.mask) and drawn.mask[0, WINDOW]
    hidden = np.random.default_rng(0).standard_normal((1, WINDOW + 1, sum(WIDTHS)), dtype=np.float32)
    hidden[:, WINDOW, POOLED:] = 0
    turned = host.probe_rotate(hidden, drawn.u, drawn.v, drawn.angle, drawn.phase)[0]
    before, after = hidden[0, WINDOW], turned[:, WINDOW]
    assert not after[:, POOLED:].any() and np.array_equal(after[0], before)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), np.linalg.norm(before), rtol=1e-5)
    cosine = after[1:] @ before / (np.linalg.norm(before) ** 2)
    np.testing.assert_allclose(cosine, np.cos(0.7), rtol=1e-4)


def test_a_prompt_in_which_no_token_turns_keeps_its_pooled_embedding(bundle: Bundle) -> None:
    manifest = replace(bundle.manifest, rotate="tokens")
    drawer = Neighbourhood(manifest, ProbeConfig(count=3, target="prompt"), sum(WIDTHS))
    empty = Request(open_tokenizer(bundle).encode("")[0], 1)
    assert not drawer.draw([empty], range(3)).mask.any() and drawer.distinct(empty, 3) == 1


def test_token_shift_moves_both_windows_alike(bundle: Bundle) -> None:
    drawer = Neighbourhood(bundle.manifest, ProbeConfig(kind="token_shift", count=4), sum(WIDTHS))
    ids = open_tokenizer(bundle).encode("a red star")[0]
    rows = drawer.draw([Request(ids, 1)], range(4)).ids
    for row, shift in zip(rows, range(4), strict=True):
        for at in (0, WINDOW):
            tokens = ids[at + 1 : at + 4]
            assert row[at + 1 : at + 4].tolist() == np.roll(tokens, shift).tolist()
            assert np.array_equal(row[at + 4 : at + WINDOW], ids[at + 4 : at + WINDOW]) and row[at] == ids[at]


def test_a_longer_reading_by_one_encoder_turns_in_both(bundle: Bundle) -> None:
    """An exclamation mark is no filler for the first encoder, and one token of its own for the second."""
    tokenizer = open_tokenizer(bundle)
    ids = tokenizer.encode("a star!!!")[0]
    second = bundle.manifest.second_text
    assert second is not None
    drawer = Neighbourhood(bundle.manifest, ProbeConfig(count=2), sum(WIDTHS))
    ends = drawer._end(ids[None])[0]
    eos = bundle.manifest.tokens.eos
    assert [int(ids[0 + ends[0]]), int(ids[WINDOW + ends[1]])] == [eos, eos]
    assert drawer.draw([Request(ids, 1)], range(2)).mask[0, :WINDOW].sum() == max(ends)


def edited(model: Path, folder: Path, file: str, **changes: object) -> Path:
    """A copy of the model with keys of one of its files changed; None removes one."""
    copy = Path(shutil.copytree(model, folder / "model"))
    values = json.loads((copy / file).read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (copy / file).write_text(json.dumps(kept))
    return copy


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (INDEX, {"text_encoder_2": None}, "StableDiffusionXLPipeline lacks a text_encoder_2"),
        (INDEX, {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline has a text_encoder_2"),
        (
            INDEX,
            {"safety_checker": [None, None]},
            "names no safety_checker, and nothing runs .* --checker DIR",
        ),
        ("unet/config.json", {"addition_embed_type": "text"}, "must be 'text_time'; got 'text'"),
        ("unet/config.json", {"cross_attention_dim": 64}, "cross_attention_dim must be 160; got 64"),
        (
            "unet/config.json",
            {"projection_class_embeddings_input_dim": 99},
            "must be 80 and 96, the pooled text and six sizes; got 99",
        ),
        ("text_encoder_2/config.json", {"projection_dim": "x"}, "projection_dim must be one whole number"),
        ("text_encoder_2/config.json", {"max_position_embeddings": 16}, "tokenizer_2 gives"),
        ("tokenizer_2/special_tokens_map.json", {"bos_token": "<|endoftext|>"}, "tokenizer_2 gives"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    paired_model: Path, tmp_path: Path, file: str, changes: dict, message: str
) -> None:
    model = edited(paired_model, tmp_path, file, **changes)
    with pytest.raises(BundleError, match=message):
        exporting.export_bundle(model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [model]


def test_added_conditioning_belongs_to_two_encoders(tiny_model: Path, tmp_path: Path) -> None:
    model = edited(tiny_model, tmp_path, "unet/config.json", addition_embed_type="text_time")
    with pytest.raises(BundleError, match="addition_embed_type must be None; got 'text_time'"):
        Sizes.read(ModelFolder.open(model), WINDOW)


def test_a_model_without_a_checker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match="names no safety_checker, and nothing runs without a safety checker"
    ):
        exporting.export_bundle(synth("tiny-sdxl", tmp_path / "xl"), tmp_path / "bundle")


def test_two_encoders_are_not_trained(paired_model: Path) -> None:
    with pytest.raises(BundleError, match="two text encoders .* are exported and not trained"):
        TrainingModel.open(paired_model)


@pytest.mark.parametrize("variant", ["plain", "sharded", "fp16"])
def test_weights_in_every_form_are_one_model(
    paired_model: Path, tmp_path: Path, variant: str, pipeline: Any
) -> None:
    saved: Callable[..., None] = pipeline.save_pretrained
    options = {"plain": {}, "sharded": {"max_shard_size": "400KB"}, "fp16": {"variant": "fp16"}}[variant]
    saved(tmp_path / "model", **options)
    for part in ("safety_checker", "feature_extractor"):
        shutil.copytree(paired_model / part, tmp_path / "model" / part, dirs_exist_ok=True)
    shutil.copyfile(paired_model / INDEX, tmp_path / "model" / INDEX)
    here, there = ModelFolder.open(tmp_path / "model"), ModelFolder.open(paired_model)
    for part in ("text_encoder", "text_encoder_2", "unet"):
        assert (len(here.weights(part)) > 1) == (variant == "sharded")
        left, right = (folder.load(part).state_dict() for folder in (here, there))
        assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
