"""A model put together for export: another checker, a tiny autoencoder, LoRAs folded into the weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from safelight.cli import main
from safelight.containment import digest
from safelight.engine.eager import load_graph
from safelight.engine.model_folder import INDEX, ModelFolder
from safelight.engine.model_source import ModelSource
from safelight.errors import BundleError, ExportError
from safelight.export import bundle as exporting
from safelight.export.assembly import RECORD, Changes, assembled
from safelight.export.guards import defences
from safelight.export.lora import Lora
from safelight.export.synth import synth
from safelight.export.verify import verify_bundle
from safelight.manifest import Manifest

RANK, ALPHA = 3, 1.5
# layers of `tiny-sd` and `tiny-sdxl-turbo` by part: a linear one each, and a filter
UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
FILTER = "down_blocks.0.resnets.0.conv1"
TEXT, VALUE = (f"encoder.layers.1.self_attn.{name}" for name in ("out_proj", "v_proj"))


def source(path: Path) -> ModelSource:
    return ModelSource(path, path.name)


def put_together(model: Path, folder: Path, **changes: Any) -> Path:
    """A model with its changes, kept in `folder`."""
    with assembled(source(model), Changes(**changes), beside=folder, keep=folder) as made:
        return made


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth("taesd", tmp_path_factory.mktemp("models") / "taesd")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the turbo class without a checker."""
    model = synth("tiny-sd-turbo", tmp_path_factory.mktemp("models") / "bare")
    index = json.loads((model / INDEX).read_text())
    for part in ("safety_checker", "feature_extractor"):
        shutil.rmtree(model / part)
        index[part] = [None, None]
    (model / INDEX).write_text(json.dumps(index))
    return model


def thin(shape: torch.Size, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices of a LoRA on a weight of this shape: down and up."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn((RANK, *shape[1:]), generator=generator)
    up = torch.randn((shape[0], RANK, *(1 for _ in shape[2:])), generator=generator)
    return down, up


def weight_of(model: Path, part: str, layer: str) -> torch.Tensor:
    network: Any = ModelFolder.open(model).load(part)
    if part == "text_encoder_2":
        network = network.text_model
    return network.get_submodule(layer).weight


def expected(before: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale (alpha / rank) up down, stored as the model's float16."""
    product = (up.flatten(1) @ down.flatten(1)).reshape(before.shape)
    return (before + scale * ALPHA / RANK * product).half().float()


STYLES = ("kohya", "peft", "diffusers")


def write_lora(path: Path, style: str, layers: dict[tuple[str, str], tuple], paired: bool) -> Path:
    """A LoRA file as kohya's scripts, peft, or older diffusers would write it."""
    tensors = {}
    for (part, layer), (down, up) in layers.items():
        own = layer if part == "unet" else f"text_model.{layer}"
        if style == "kohya":
            te = {"text_encoder": "te1" if paired else "te", "text_encoder_2": "te2", "unet": "unet"}[part]
            key = f"lora_{te}_{own.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
            continue
        old = "lora" if part == "unet" else "lora_linear_layer"
        first, second = ("lora_A", "lora_B") if style == "peft" else (f"{old}.down", f"{old}.up")
        tensors |= {f"{part}.{own}.{first}.weight": down, f"{part}.{own}.{second}.weight": up}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("paired", [False, True])
def test_a_lora_is_folded_as_its_formula_says(
    tiny_model: Path, paired_model: Path, tmp_path: Path, style: str, paired: bool
) -> None:
    model = paired_model if paired else tiny_model
    wanted = [("unet", UNET), ("unet", FILTER), ("text_encoder", TEXT), ("text_encoder", VALUE)]
    wanted += [("text_encoder_2", TEXT)] if paired else []
    before = {key: weight_of(model, *key) for key in wanted}
    layers = {key: thin(value.shape, seed) for seed, (key, value) in enumerate(before.items())}
    file = write_lora(tmp_path / "ink.safetensors", style, layers, paired)
    made = put_together(model, tmp_path / "made", loras=(Lora(file, 0.5),))
    scale = 0.5 if style == "kohya" else 0.5 * RANK / ALPHA  # without an alpha it is the rank
    for key, (down, up) in layers.items():
        found = weight_of(made, *key)
        torch.testing.assert_close(found, expected(before[key], down, up, scale), rtol=1e-3, atol=1e-6)
        assert (found - before[key]).abs().max() > 0.05
    for part in {part for part, _ in wanted}:
        one, other = (ModelFolder.open(folder).load(part).state_dict() for folder in (model, made))
        names = {layer for own, layer in wanted if own == part}
        changed = {key for key in one if not torch.equal(one[key], other[key])}
        assert len(changed) == len(names) and all(any(name in key for name in names) for key in changed)
    record = json.loads((made / RECORD).read_text())
    assert record["changes"][-2] == f"lora: ink.safetensors (SHA-256 {digest(file)}) at 0.5"
    assert record["changes"][-1] == "loras folded into: " + ", ".join(dict(wanted))


@pytest.mark.parametrize("paired", [False, True])
def test_a_folded_lora_is_what_diffusers_draws_with(
    tiny_model: Path, paired_model: Path, tmp_path: Path, paired: bool
) -> None:
    """Two files one after the other, through diffusers' own loader and fuse, to the UNet's answer."""
    model = paired_model if paired else tiny_model
    parts = ["text_encoder", *(["text_encoder_2"] if paired else [])]
    files = []
    for number, scale in enumerate((0.6, -0.3)):
        keys = [("unet", UNET), *((part, TEXT) for part in parts)]
        layers = {key: thin(weight_of(model, *key).shape, 7 * number + at) for at, key in enumerate(keys)}
        path = write_lora(tmp_path / f"{number}.safetensors", "kohya", layers, paired)
        files.append(Lora(path, scale))
    made = put_together(model, tmp_path / "made", loras=tuple(files))
    kind: Any = StableDiffusionXLPipeline if paired else StableDiffusionPipeline
    pipeline = kind.from_pretrained(
        model, safety_checker=None, local_files_only=True, torch_dtype=torch.float32
    )
    for number, lora in enumerate(files):
        pipeline.load_lora_weights(load_file(lora.path), adapter_name=f"n{number}")
    names = [f"n{number}" for number, _ in enumerate(files)]
    pipeline.set_adapters(names, [lora.scale for lora in files])
    pipeline.fuse_lora(components=["unet", *parts], adapter_names=names)
    folder = ModelFolder.open(made)
    for part in ("unet", *parts):
        theirs = dict(getattr(pipeline, part).named_modules())
        for name, parameter in folder.load(part).named_parameters():
            module, _, last = name.rpartition(".")
            layer = theirs[module]
            wanted = getattr(getattr(layer, "base_layer", layer), last)
            torch.testing.assert_close(parameter, wanted.half().float(), rtol=2e-3, atol=1e-5)


def test_a_model_that_takes_a_lora_loses_what_does_not_know_it(guarded_model: Path, tmp_path: Path) -> None:
    layers = {("unet", UNET): thin(weight_of(guarded_model, "unet", UNET).shape, 1)}
    file = write_lora(tmp_path / "a.safetensors", "peft", layers, False)
    made = put_together(guarded_model, tmp_path / "made", loras=(Lora(file),))
    folder = ModelFolder.open(made)
    assert not folder.has_one_step and not folder.has("redirector") and not folder.has("latent_checker")
    assert defences(ModelFolder.open(guarded_model)) and not defences(folder)
    lines = json.loads((made / RECORD).read_text())["changes"]
    assert f"no longer claimed: {'; '.join(defences(ModelFolder.open(guarded_model)))}" in lines
    assert "left out: latent_checker, redirector, unet_one_step, made for the model before" in lines
    # what the detector probes with is the UNet that generates
    detector, unet = load_graph(made, "detector"), load_graph(made, "unet")
    state = detector.unet.state_dict()
    assert all(torch.equal(state[key], value) for key, value in unet.network.state_dict().items())


def test_the_model_that_takes_a_lora_stays_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    """Float32 weights are mapped into memory, changed there, and their links replaced."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (file,) = (model / "unet").glob("*.safetensors")
    save_file({key: value.float() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    before = {path: digest(path) for path in sorted(model.rglob("*")) if path.is_file()}
    layers = {("unet", UNET): thin(weight_of(model, "unet", UNET).shape, 1)}
    lora = write_lora(tmp_path / "a.safetensors", "peft", layers, False)
    made = put_together(model, tmp_path / "made", loras=(Lora(lora),))
    assert {path: digest(path) for path in sorted(model.rglob("*")) if path.is_file()} == before
    stored = load_file(made / "unet/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert digest(made / "unet" / file.name) != before[file]


def test_a_turbo_model_takes_a_lora_into_the_one_unet_that_it_has(
    bare: Path, tiny_model: Path, tmp_path: Path
) -> None:
    layers = {("unet", UNET): thin(weight_of(tiny_model, "unet", UNET).shape, 1)}
    file = write_lora(tmp_path / "a.safetensors", "peft", layers, False)
    made = put_together(bare, tmp_path / "made", checker=source(tiny_model), loras=(Lora(file),))
    assert ModelFolder.open(made).is_turbo


def spoilt(kind: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """What is wrong with a LoRA's tensors."""
    key = f"unet.{UNET}"
    changes: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
        "width": lambda found: {
            name: value.repeat(1, 2)[:, : value.shape[1] + 1].contiguous() for name, value in found.items()
        },
        "layer": lambda found: (
            found
            | {
                "unet.mid_block.nothing.to_q.lora_A.weight": torch.ones(RANK, 4),
                "unet.mid_block.nothing.to_q.lora_B.weight": torch.ones(4, RANK),
            }
        ),
        "part": lambda found: {name.replace("unet.", "transformer."): value for name, value in found.items()},
        "dora": lambda found: found | {f"{key}.dora_scale": torch.ones(1)},
        "loha": lambda found: {f"{key}.hada_w1_a": torch.ones(2, 2)},
        "nan": lambda found: {name: value * torch.nan for name, value in found.items()},
        "half": lambda found: {name: value for name, value in found.items() if "lora_A" in name},
        "none": lambda found: {},
    }
    return changes[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("width", "does not fit this model"),
        ("layer", "does not fit this model|this model has no layer for unet.mid_block.nothing.to_q"),
        ("part", "this model has no layer for transformer"),
        ("dora", "is no tensor of a LoRA"),
        ("loha", "is no tensor of a LoRA"),
        ("nan", "is not all finite"),
        ("half", "does not fit this model"),
        ("none", "holds no tensors"),
    ],
)
def test_a_wrong_lora_is_refused(tiny_model: Path, tmp_path: Path, kind: str, message: str) -> None:
    layers = {("unet", UNET): thin(weight_of(tiny_model, "unet", UNET).shape, 1)}
    file = write_lora(tmp_path / "a.safetensors", "peft", layers, False)
    save_file(spoilt(kind)(load_file(file)), file)
    with pytest.raises(ExportError, match=message) as caught:
        put_together(tiny_model, tmp_path / "made", loras=(Lora(file),))
    assert str(file) in str(caught.value) and ";" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]


def test_a_lora_that_is_no_safetensors_file_is_never_opened(tiny_model: Path, tmp_path: Path) -> None:
    for name, content in (("a.pt", b"x"), ("b.safetensors", b"x" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ExportError, match=name):
            put_together(tiny_model, tmp_path / "made", loras=(Lora(tmp_path / name),))
    with pytest.raises(ExportError, match=r"c\.safetensors is no \.safetensors file"):
        put_together(tiny_model, tmp_path / "made", loras=(Lora(tmp_path / "c.safetensors"),))


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [("a.safetensors", "a.safetensors", 1.0), ("x/a.safetensors:-0.5", "x/a.safetensors", -0.5)],
)
def test_a_scale_stands_behind_the_file(text: str, path: str, scale: float) -> None:
    assert Lora.parse(text) == Lora(Path(path), scale)
    for wrong in ("a.safetensors:much", "a.safetensors:nan", "a.safetensors:inf"):
        with pytest.raises(ValueError, match=r"FILE\.safetensors:SCALE"):
            Lora.parse(wrong)


# the tiny autoencoder


def test_a_tiny_autoencoder_reads_and_gives_the_latents_of_the_unet(
    tiny_model: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    made = put_together(tiny_model, tmp_path / "made", tiny_decoder=source(tiny_decoder))
    folder = ModelFolder.open(made)
    assert (folder.scaling_factor(), folder.picture(), folder.is_tiny) == (1.0, 64, True)
    network = AutoencoderTiny.from_pretrained(tiny_decoder)
    generator = torch.Generator().manual_seed(1)
    latents, pictures = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 3, 64, 64)))
    pipeline = StableDiffusionPipeline.from_pretrained(
        made, safety_checker=None, local_files_only=True, requires_safety_checker=False
    )
    assert isinstance(pipeline.vae, AutoencoderTiny)
    with torch.inference_mode():
        assert torch.equal(load_graph(made, "vae_decoder")(latents), network.decode(latents).sample)
        assert torch.equal(load_graph(made, "vae_encoder")(pictures), network.encode(pictures).latents)
        x0, hidden = latents * 2, torch.zeros(2, 32, 64)
        detector = load_graph(made, "detector")
        detector.x0 = lambda *_: x0
        drawn, finite = detector.draw(hidden, latents)
        scaled = x0 / pipeline.vae.config.scaling_factor  # as the pipeline does
        wanted = pipeline.image_processor.postprocess(pipeline.vae.decode(scaled).sample, output_type="pt")
    torch.testing.assert_close(drawn, wanted)
    assert finite.all()


def test_a_tiny_autoencoder_is_exported_and_verified(
    tiny_model: Path, tiny_decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("vae_decoder", "vae_encoder")
    monkeypatch.setattr(exporting, "GRAPHS", few)
    monkeypatch.setattr("safelight.manifest.REQUIRED_GRAPHS", few)
    arguments = ["export", str(tiny_model), str(tmp_path / "bundle"), "--tiny-decoder", str(tiny_decoder)]
    result = CliRunner().invoke(main, [*arguments, "--keep-model", str(tmp_path / "kept")])
    assert result.exit_code == 0, result.output
    manifest = Manifest.load(tmp_path / "bundle")
    assert manifest.picture.scaling_factor == 1.0 and manifest.source.name == tiny_model.name
    assert manifest.source.changes == ("autoencoder: taesd",)
    assert {row.graph for row in manifest.verification} == {*few} and all(
        row.ok for row in manifest.verification
    )
    assert all(row.ok for row in verify_bundle(tmp_path / "bundle", tmp_path / "kept"))
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "bundle")])
    assert "autoencoder: taesd" in shown.stdout
    with pytest.raises(BundleError, match=r"put together with autoencoder: taesd: .* --keep-model DIR"):
        verify_bundle(tmp_path / "bundle", tiny_model)


def test_what_is_no_tiny_autoencoder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="must be AutoencoderTiny; got 'AutoencoderKL'"):
        put_together(tiny_model, tmp_path / "made", tiny_decoder=source(tiny_model))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"holds no config\.json"):
        put_together(tiny_model, tmp_path / "made", tiny_decoder=source(tmp_path / "empty"))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_latents_that_are_shifted_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps(config | {"shift_factor": 0.1}))
    with pytest.raises(BundleError, match=r"scaled and never shifted; got shift_factor 0\.1"):
        ModelFolder.open(model).scaling_factor()


# the checker


def test_a_checker_of_another_model_makes_a_model_of_one_without(
    bare: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="nothing runs without a safety checker; .* --checker DIR"):
        ModelFolder.open(bare)
    made = put_together(bare, tmp_path / "made", checker=source(tiny_model))
    folder = ModelFolder.open(made)
    assert folder.digests()["safety_checker/model.safetensors"] == digest(
        tiny_model / "safety_checker/model.safetensors"
    )
    assert folder.path.joinpath("unet/diffusion_pytorch_model.safetensors").samefile(
        bare / "unet/diffusion_pytorch_model.safetensors"
    )
    record = json.loads((made / RECORD).read_text())
    assert record == {"name": "bare", "revision": None, "changes": [f"checker: {tiny_model.name}"]}


def test_a_temporary_folder_is_gone_afterwards(bare: Path, tiny_model: Path, tmp_path: Path) -> None:
    changes = Changes(checker=source(tiny_model))
    with (
        pytest.raises(KeyboardInterrupt),
        assembled(source(bare), changes, beside=tmp_path / "bundle") as made,
    ):
        ModelFolder.open(made)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [] and (bare / "unet").is_dir()


def test_a_folder_without_a_checker_gives_none(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"safety_checker is missing; name a folder that holds safety_checker and"
    ):
        put_together(bare, tmp_path / "made", checker=source(bare))
    assert list(tmp_path.iterdir()) == []


def test_another_checker_leaves_the_latent_checker_out(
    guarded_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """It was taught what another checker says."""
    folder = ModelFolder.open(put_together(guarded_model, tmp_path / "made", checker=source(tiny_model)))
    assert not folder.has("latent_checker") and folder.has("redirector") and folder.has_one_step
    assert defences(folder) == defences(ModelFolder.open(guarded_model)) != ()


def test_a_record_that_is_none_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for wrong in (
        {},
        {"name": 1, "changes": []},
        {"name": "a", "changes": "x"},
        {"name": "a", "changes": [2]},
    ):
        (model / RECORD).write_text(json.dumps(wrong))
        with pytest.raises(BundleError, match="is not the record of an assembly"):
            exporting.export_bundle(model, tmp_path / "bundle")


def test_a_variant_of_the_weights_is_taken_where_it_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for part in ("unet", "text_encoder", "vae", "safety_checker"):
        (file,) = (model / part).glob("*.safetensors")
        half = {key: value + 1 for key, value in load_file(file).items()}
        save_file(half, file.with_name(file.name.replace(".safe", ".fp16.safe")), metadata={"format": "pt"})
    plain, half = ModelFolder.open(model), ModelFolder.open(model, "fp16")
    for part in ("unet", "text_encoder"):
        one, other = (folder.load(part).state_dict() for folder in (plain, half))
        key = next(name for name, value in one.items() if value.is_floating_point())
        np.testing.assert_allclose(other[key].numpy(), one[key].numpy() + 1, atol=2e-3)
    assert all((".fp16." in name) == ("one_step" not in name) for name in half.digests())
    made = put_together(model, tmp_path / "made", variant="fp16", checker=source(tiny_model))
    assert {name for name in ModelFolder.open(made).digests() if ".fp16." in name} == {
        name for name in half.digests() if ".fp16." in name and "safety" not in name
    }
    with pytest.raises(BundleError, match="holds no weights of the variant 'fp16'; leave the variant out"):
        ModelFolder.open(tiny_model, "fp16")
