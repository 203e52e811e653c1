"""The optional graphs: a latent checker, its detector and a redirector, from the model folder to the bundle.

What the detector of latents says is tied to the detector of pictures, with which it shares all but the
looking.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from safelight.cli import main
from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.eager import load_graph
from safelight.engine.model_folder import ModelFolder
from safelight.errors import BundleError
from safelight.export import bundle as exporting
from safelight.export.bundle import export_bundle
from safelight.export.verify import Case, compare, draw
from safelight.manifest import GRAPHS, OPTIONAL_GRAPHS, Checker, Manifest
from safelight.models.shapes import BUNDLE_FOLDER
from safelight.plain import from_plain, to_plain

CASE = Case({"requests": 3, "probes": 4})


@pytest.fixture(scope="module")
def bundle(guarded_bundle: Path) -> Bundle:
    return open_bundle(guarded_bundle)


@pytest.fixture(scope="module")
def inputs(bundle: Bundle) -> dict[str, np.ndarray]:
    return draw(bundle.manifest.graphs["detector_latent"], bundle.manifest, CASE)


def eager(model: Path, graph: str, *values: Any) -> Any:
    with torch.inference_mode():
        return load_graph(model, graph)(*(torch.as_tensor(value) for value in values))


def test_a_bundle_says_what_it_holds(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert set(manifest.graphs) == {*GRAPHS, *OPTIONAL_GRAPHS}
    assert manifest.checker.latent_band == 0.01 and manifest.defences == ("sdd: star, pentagram", "aekt")
    pictures, latents = (manifest.graphs[name] for name in ("detector", "detector_latent"))
    assert latents.inputs == pictures.inputs and latents.outputs[:-1] == pictures.outputs[:-1]
    shown = latents.outputs[-1]
    assert (shown.name, shown.axes) == ("x0", ("requests", "probes", *manifest.picture.latents))
    said = CliRunner().invoke(main, ["inspect", str(bundle.folder)]).stdout
    assert "latent checker  cascade within 0.01 of 0" in said and "may be redirected" in said
    assert "sdd: star, pentagram, aekt" in said and "detector_latent" in said


def test_the_graphs_are_the_eager_networks(bundle: Bundle, guarded_model: Path) -> None:
    """By `verify`, which calls a wrong decision and a NaN that is not the reference's a fault."""
    graphs = {name: bundle.manifest.graphs[name] for name in OPTIONAL_GRAPHS}
    rows = list(
        compare(
            Bundle(bundle.folder, replace(bundle.manifest, graphs=graphs)), ModelFolder.open(guarded_model)
        )
    )
    assert {row.graph for row in rows} == set(OPTIONAL_GRAPHS) and len(rows) == 2 + 4 + 2
    assert [row for row in rows if not row.ok] == []


def test_both_detectors_look_at_the_same_latents(guarded_model: Path, inputs: dict[str, np.ndarray]) -> None:
    margins, flagged, finite, score, blocked, x0 = eager(guarded_model, "detector_latent", *inputs.values())
    *_, images = eager(guarded_model, "detector", *inputs.values())
    rows = x0.flatten(0, 1)
    scale = ModelFolder.open(guarded_model).scaling_factor()
    decoded = eager(guarded_model, "vae_decoder", rows / scale)
    torch.testing.assert_close(images.flatten(0, 1), (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    own = eager(guarded_model, "latent_checker", rows)
    torch.testing.assert_close(margins.flatten(0, 1), own, rtol=1e-4, atol=1e-6)
    assert finite.all() and torch.equal(flagged, (margins > 0).any(-1))
    assert torch.equal(score, flagged.float().mean(1))
    assert torch.equal(blocked, flagged.sum(1) >= torch.as_tensor(inputs["need"]))


@pytest.mark.parametrize("name", ["prompt_u", "latents", "angle"])
def test_what_is_not_finite_blocks_its_request_alone(
    bundle: Bundle, inputs: dict[str, np.ndarray], name: str
) -> None:
    stage = open_backend("onnxruntime", bundle, threads=1).stage("detector_latent")
    stage.plan(**CASE.axes)
    spoilt = inputs | {name: inputs[name].copy(), "need": np.full(3, 9)}
    spoilt[name].reshape(3, 4, -1)[1, 2, 0] = np.nan
    found = stage.run(spoilt)
    assert found["blocked"].tolist() == [False, True, False]
    assert np.argwhere(~found["finite"]).tolist() == [[1, 2]] and found["flagged"][1, 2]


def test_a_row_of_a_batch_is_the_single_run(bundle: Bundle, inputs: dict[str, np.ndarray]) -> None:
    backend = open_backend("onnxruntime", bundle, threads=1)
    stage = backend.stage("detector_latent")
    stage.plan(**CASE.axes)
    together = {name: value.copy() for name, value in stage.run(inputs).items()}
    stage.plan(requests=1, probes=4)
    for row in range(3):
        alone = stage.run({name: value[row : row + 1] for name, value in inputs.items()})
        for name, value in alone.items():
            np.testing.assert_allclose(value[0], together[name][row], rtol=1e-3, atol=1e-4, err_msg=name)
    redirector = backend.stage("redirector")
    hidden = np.random.default_rng(1).standard_normal((3, 32, 64), dtype=np.float32)
    redirector.plan(batch=3)
    whole = redirector.run({"hidden": hidden})["redirected"].copy()
    redirector.plan(batch=1)
    one = redirector.run({"hidden": hidden[1:2]})["redirected"]
    np.testing.assert_allclose(one[0], whole[1], rtol=1e-4, atol=1e-5)


# the model folder


def reconfigure(part: str, **changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def record(text: str) -> Callable[[Path], None]:
    return lambda model: (model / "defences.json").write_text(text) and None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            reconfigure("latent_checker", concepts=99),
            r"latent_checker/config.json: concepts must be \d+, .* got 99",
        ),
        (reconfigure("latent_checker", in_channels=8), "in_channels must be 4, .* got 8"),
        (reconfigure("latent_checker", sample_size=64), "sample_size must be 8, .* got 64"),
        (reconfigure("redirector", width=768), "redirector/config.json: width must be 64, .* got 768"),
        (reconfigure("redirector", window=None), "window must be 32, .* got None"),
        (record('{"defences": {"method": "sdd"}}'), "defences.json is not a list of defences"),
        (record('{"defences": [{"concepts": ["star"]}]}'), "is not a list of defences"),
        (record('{"defences": [{"method": "sdd", "concepts": "star"}]}'), "is not a list of defences"),
    ],
)
def test_what_does_not_fit_is_refused(
    guarded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    monkeypatch.setattr(exporting, "_write_graph", lambda *_, **__: None)
    monkeypatch.setattr(exporting, "GRAPHS", ())
    model = Path(shutil.copytree(guarded_model, tmp_path / "model"))
    change(model)
    with pytest.raises(BundleError, match=message):
        export_bundle(model, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_without_the_parts_gives_a_bundle_without_them(
    guarded_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the export itself, of two graphs alone: one that all folders have, and the redirector."""
    few = ("text_encoder",)
    monkeypatch.setattr(exporting, "GRAPHS", few)
    monkeypatch.setattr("safelight.manifest.REQUIRED_GRAPHS", few)
    model = Path(shutil.copytree(guarded_model, tmp_path / "model"))
    shutil.rmtree(model / "latent_checker")
    (model / "defences.json").unlink()
    manifest = export_bundle(model, tmp_path / "bundle")
    assert set(manifest.graphs) == {"text_encoder", "redirector"} and manifest.defences == ()
    assert manifest.checker.latent_band is None and "latent_band" not in manifest.to_bytes().decode()
    assert {row.graph for row in manifest.verification} == {"text_encoder", "redirector"}
    for graph in ("latent_checker", "detector_latent"):
        with pytest.raises(BundleError, match=r"holds no latent_checker; name a folder"):
            load_graph(model, graph)
        with pytest.raises(BundleError, match=f"has no {graph}"):
            open_backend("onnxruntime", open_bundle(tmp_path / "bundle")).stage(graph)
    with pytest.raises(ValueError, match=r"graph must be one of .*'redirector'.*; got 'vae'"):
        load_graph(model, "vae")


def test_the_eager_backend_holds_to_the_band_of_the_bundle(
    bundle: Bundle, guarded_model: Path, tmp_path: Path
) -> None:
    assert open_backend("torch", bundle, model=guarded_model)
    model = Path(shutil.copytree(guarded_model, tmp_path / "model"))
    reconfigure("latent_checker", band=0.0)(model)
    assert ModelFolder.open(model).latent_band() is None  # nobody calibrated it
    with pytest.raises(BundleError, match="latent_checker has other settings than"):
        open_backend("torch", bundle, model=model)


# the manifest


def test_a_manifest_without_a_band_is_what_it_was() -> None:
    """The shipped bundle was made before there was a band, and keeps its bytes and so its id."""
    manifest = Manifest.load(BUNDLE_FOLDER, verify="sizes")
    values = json.loads((BUNDLE_FOLDER / "safelight.json").read_text())
    assert Manifest.from_json(values).bundle_id == manifest.bundle_id
    if manifest.checker.latent_band is None:
        assert "latent_band" not in values["checker"]
    assert manifest.to_bytes() == (BUNDLE_FOLDER / "safelight.json").read_bytes()


def test_a_band_is_written_where_there_is_one() -> None:
    plain = Checker(48, (0.5,) * 3, (0.25,) * 3, ("star",), ())
    values = to_plain(plain)
    assert "latent_band" not in values and from_plain(Checker, values, "checker") == plain
    banded = replace(plain, latent_band=0.25)
    assert to_plain(banded)["latent_band"] == 0.25
    assert from_plain(Checker, to_plain(banded), "checker") == banded
    assert from_plain(Checker, values | {"latent_band": None}, "checker") == plain
    for odd in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="latent_band must be finite and at least 0"):
            replace(plain, latent_band=odd)
    with pytest.raises(ValueError, match=re.escape("checker.latent_band must be")):
        from_plain(Checker, values | {"latent_band": "wide"}, "checker")
