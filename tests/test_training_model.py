"""A model folder in training: the algebra of its predictions, sampling against diffusers, and saving."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from safelight.defenses.training_model import RECORD, TrainingModel, read_losses, read_record
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError, SafelightError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> TrainingModel:
    return TrainingModel.open(tiny_model)


def with_scheduler(source: Path, to: Path, **changes: object) -> Path:
    """The folder again with other settings of its scheduler."""
    shutil.copytree(source, to)
    path = to / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


def noise_of(model: TrainingModel, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_predictions_are_inverse_to_adding_noise(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    model = TrainingModel.open(with_scheduler(tiny_model, tmp_path / "m", prediction_type=kind))
    x0, noise = noise_of(model, 17), noise_of(model, 17, 1)
    t = torch.linspace(20, 900, 17).long()
    x_t = model.add_noise(x0, noise, t)
    a, s = model.levels(t)
    torch.testing.assert_close(a * a + s * s, torch.ones_like(a))
    out = model.target(x0, noise, t)
    for found, truth, part in ((model.x0_of(out, x_t, t), x0, a), (model.eps_of(out, x_t, t), noise, s)):
        # what is left of a part after float32 rounding grows as the part itself shrinks
        assert ((found - truth).abs() * part).max() < 2e-6
    other = model.target(x0 + 1, noise, t), model.target(x0, noise + 1, t)
    changed = [not torch.equal(value, out) for value in other]
    assert changed == {"epsilon": [False, True], "v_prediction": [True, True], "sample": [True, False]}[kind]


def test_noise_is_that_of_diffusers(model: TrainingModel, tiny_model: Path, tol: dict) -> None:
    scheduler = DDIMScheduler.from_pretrained(tiny_model, subfolder="scheduler")
    x0, noise, t = noise_of(model, 3), noise_of(model, 3, 1), torch.tensor([0, 500, 999])
    near = tol[torch.float32]
    torch.testing.assert_close(model.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), **near)
    torch.testing.assert_close(model.target(x0, noise, t), scheduler.get_velocity(x0, noise, t), **near)
    assert model.schedule.prediction_type == "v_prediction" and model.timesteps == 1000


def test_the_first_latents_are_the_noise(model: TrainingModel) -> None:
    noise, hidden = noise_of(model, 3), model.encode(["a", "b", "c"])
    for solver in ("ddim", "dpmpp_2m"):
        start = model.sample(model.unet, hidden, noise, steps=5, guidance_scale=3.0, stop=0, solver=solver)
        assert torch.equal(start, noise)
    for stop in (-1, 6):
        with pytest.raises(ValueError, match=r"stop must lie in \[0, 5\]"):
            model.sample(model.unet, hidden, noise, steps=5, guidance_scale=3.0, stop=stop)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_samples_are_those_of_diffusers(model: TrainingModel, tiny_model: Path, guidance: float) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_model, torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.scheduler = DDIMScheduler.from_pretrained(tiny_model, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    texts, noise = ["a red star", "", "a blue circle above a ring"], noise_of(model, 3)
    theirs = pipeline(
        texts, latents=noise, num_inference_steps=4, guidance_scale=guidance, output_type="latent"
    ).images
    ours = model.sample(model.unet, model.encode(texts), noise, steps=4, guidance_scale=guidance)
    # errors of one call grow over the steps; the scale is that of the latents
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    pixels = pipeline.vae.decode(theirs / pipeline.vae.config.scaling_factor).sample.detach()
    torch.testing.assert_close(model.pictures(theirs), (pixels / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-6)


def test_stopping_is_a_prefix_and_rows_do_not_meet(model: TrainingModel, tol: dict) -> None:
    noise, hidden = noise_of(model, 3), model.encode(["a red star", "a ring", ""])
    states = []

    class Watched(nn.Module):
        def forward(self, x: torch.Tensor, *rest: object, **options: object) -> tuple[torch.Tensor]:
            states.append(x[:3].clone())
            return model.unet(x, *rest, **options)

    options = {"steps": 4, "guidance_scale": 2.0}
    last = model.sample(Watched(), hidden, noise, **options)
    for stop, state in enumerate(states):
        found = model.sample(model.unet, hidden, noise, stop=stop, **options)
        torch.testing.assert_close(found, state, **tol[torch.float32])
    assert torch.equal(model.sample(model.unet, hidden, noise, stop=4, **options), last)
    alone = model.sample(model.unet, hidden[1:2], noise[1:2], **options)
    assert (alone - last[1:2]).abs().max() < 1e-5 * last.abs().max()
    free = model.sample(model.unet, hidden, noise, free=model.encode(["a ring"]), **options)
    assert not torch.allclose(free, last, rtol=1e-3)


def test_latents_and_pictures_use_the_scale(model: TrainingModel, tol: dict) -> None:
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    posterior = model.vae.encode(pictures * 2 - 1).latent_dist
    mean, noise = model.latents(pictures), noise_of(model, 3)
    near = tol[torch.float32]
    torch.testing.assert_close(mean, posterior.mean * model.scaling_factor, **near)
    sampled = (posterior.mean + posterior.std * noise) * model.scaling_factor
    torch.testing.assert_close(model.latents(pictures, noise), sampled, **near)
    assert model.pictures(mean).shape == pictures.shape and model.scaling_factor != 1


def test_texts_are_cut_to_the_window(model: TrainingModel) -> None:
    ids = model.ids(["", "a red star", "star " * 200])
    assert ids.shape == (3, model.tokenizer.model_max_length) and ids.dtype == torch.int64
    longest = model.folder.config("text_encoder")["max_position_embeddings"]
    assert ids.shape[1] <= longest and model.encode(["a", "b"]).shape[:2] == (2, ids.shape[1])


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def stored(source: Path, to: Path, dtype: torch.dtype, variant: str | None) -> Path:
    """The folder with its UNet stored in this dtype, under the name that diffusers gives such a variant."""
    shutil.copytree(source, to)
    shutil.rmtree(to / "unet")
    ModelFolder.open(source).load("unet").to(dtype).save_pretrained(to / "unet", variant=variant)
    return to


@pytest.mark.parametrize(
    ("dtype", "variant"), [(torch.float32, None), (torch.float16, None), (torch.float16, "fp16")]
)
def test_saving_changes_the_named_network_alone(
    tiny_model: Path, tmp_path: Path, dtype: torch.dtype, variant: str | None
) -> None:
    source = stored(tiny_model, tmp_path / "source", dtype, variant)
    file = WEIGHTS.replace(".safe", f".{variant}.safe") if variant else WEIGHTS
    (tmp_path / "losses.csv").write_text("step,loss\n0,1.5\n1,0.5\n")
    model = TrainingModel.open(source)
    parameters = dict(model.unet.named_parameters())
    name = next(key for key in parameters if "attn2" in key)
    with torch.no_grad():
        parameters[name].add_(1)
    record = {"method": "test", "concepts": ["star"]}
    model.save(tmp_path / "out", {"unet": model.unet}, record, tmp_path / "losses.csv")
    before, after = files(source), files(tmp_path / "out")
    new = {RECORD, "losses-1-test.csv"}
    assert set(after) - set(before) == new and set(before) <= set(after)
    changed = {path for path in before if before[path] != after[path]}
    assert changed - {"unet/config.json"} == {f"unet/{file}"}
    old, now = load_file(source / "unet" / file), load_file(tmp_path / "out" / "unet" / file)
    assert {key for key in old if not torch.equal(old[key], now[key])} == {name}
    assert {value.dtype for value in now.values()} == {dtype}
    assert next(model.unet.parameters()).dtype == torch.float32
    opened = ModelFolder.open(tmp_path / "out").load("unet")
    torch.testing.assert_close(opened.get_parameter(name), now[name].float(), rtol=0, atol=0)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", variant=variant)
    assert torch.equal(pipeline.unet.get_parameter(name).float(), now[name].float())
    losses = read_losses(tmp_path / "out" / "losses-1-test.csv")
    assert {key: list(value) for key, value in losses.items()} == {"step": [0, 1], "loss": [1.5, 0.5]}


def test_records_are_added_in_order(tiny_model: Path, tmp_path: Path) -> None:
    assert read_record(tiny_model) == []
    source = tiny_model
    for number in (1, 2):
        model = TrainingModel.open(source)
        with torch.no_grad():
            model.unet.conv_out.bias.add_(number)
        model.save(tmp_path / str(number), {"unet": model.unet}, {"method": f"m{number}"}, None)
        source = tmp_path / str(number)
    first, second = read_record(source)
    assert (first["method"], second["method"]) == ("m1", "m2") and first == read_record(tmp_path / "1")[0]
    assert first["networks"] == ["unet"] and "losses" not in first
    assert first["source"] == ModelFolder.open(tiny_model).digests()
    assert second["source"] == ModelFolder.open(tmp_path / "1").digests() != first["source"]


def test_saving_is_whole_or_not_at_all(tiny_model: Path, tmp_path: Path, model: TrainingModel) -> None:
    class Broken(nn.Linear):
        def save_pretrained(self, folder: Path, **options: object) -> None:
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        model.save(tmp_path / "out", {"unet": Broken(1, 1)}, {"method": "m"}, None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    with pytest.raises(SafelightError, match="not an empty folder"):
        model.save(tmp_path / "full", {}, {"method": "m"}, None)
    assert files(tmp_path) == {"full/kept.txt": b"kept"}


def test_pickles_and_hidden_files_are_left_behind(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    for name in ("unet/old.bin", "unet/old.ckpt", "extra.pt", ".secret"):
        (tmp_path / "m" / name).write_bytes(b"x")
    TrainingModel.open(tmp_path / "m").save(tmp_path / "out", {}, {"method": "m"}, None)
    assert set(files(tmp_path / "out")) == {*files(tiny_model), RECORD}


@pytest.mark.parametrize("text", ["[]", '{"defences": {}}', '{"defences": [1]}', '{"defences": [{}]}', "{}"])
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(BundleError, match=RECORD):
        read_record(tmp_path)


def test_the_shipped_weights_draw_the_same_as_the_models_own_script(tol: dict) -> None:
    from safelight.models.shapes.evaluate import open_model

    shapes = Path(__file__).resolve().parents[1] / "models/shapes"  # no wheel holds the weights

    captions, seed = ["a red circle", "a blue ring on the left"], 3
    generators, *_ = open_model(shapes / "model", shapes / "oracle/model.safetensors")
    theirs = generators.pictures(captions, seed, steps=5, guidance=3.0)
    model = TrainingModel.open(shapes / "model")
    drawn = int(np.random.default_rng((seed, 0)).integers(2**62))
    noise = noise_of(model, 2, drawn)
    latents = model.sample(model.unet, model.encode(captions), noise, steps=5, guidance_scale=3.0)
    levels = (model.pictures(latents) * 255).round()
    assert (levels - (theirs + 1) * 127.5).abs().max() <= 1.001, "a level may round to its neighbour"
