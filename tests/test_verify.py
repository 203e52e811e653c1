"""Verification: a bundle agrees with its model, and what does not agree is said, with exit code 1."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from safelight.cli import main
from safelight.containment import digest
from safelight.engine.bundle import open_bundle
from safelight.errors import BundleError
from safelight.export import verify
from safelight.export.verify import (
    IMAGES,
    TOLERANCE,
    Case,
    Truth,
    cases,
    compare_outputs,
    draw,
    verify_bundle,
)
from safelight.manifest import GRAPHS, FileEntry, Manifest

CHECKOUT = Path(__file__).resolve().parents[1] / "models/shapes/model"  # no wheel holds the weights
SMALL = {
    **{graph: {"batch 1", "batch 3"} for graph in GRAPHS},
    "detector": {
        "requests 1, probes 1",
        "requests 1, probes 8",
        "requests 3, probes 5",
        "requests 1, probes 2, NaN",
    },
}


def test_a_bundle_agrees_with_its_model(tiny_bundle: Path, tiny_model: Path) -> None:
    rows = verify_bundle(tiny_bundle, tiny_model)
    assert {(row.graph, row.shape) for row in rows} == {
        (graph, shape) for graph in SMALL for shape in SMALL[graph]
    }
    assert [row for row in rows if not row.ok] == []
    assert all(row.max_abs_err <= row.tol for row in rows)


def test_a_large_model_is_compared_at_fewer_shapes() -> None:
    assert [str(case) for case in cases("unet", large=True)] == ["batch 1", "batch 2"]
    lengths = [case.axes for case in cases("detector", large=True)]
    assert lengths == [
        {"requests": 1, "probes": 1},
        {"requests": 1, "probes": 2},
    ]


@pytest.fixture
def altered(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle in which one matrix of the detector's UNet is one percent larger, and the manifest says so."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "altered"))
    path = bundle / "detector" / "model.onnx"
    model = onnx.load(path)
    tensor = next(
        item for item in model.graph.initializer if item.name == "unet.time_embedding.linear_2.weight"
    )
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array((values * 1.01).astype(values.dtype), tensor.name))
    onnx.save(model, path)
    return bundle


def rehash(bundle: Path) -> None:
    """Give the manifest the digests of the files as they are now."""
    manifest = Manifest.from_json(json.loads((bundle / "safelight.json").read_text()))
    files = {
        name: FileEntry(digest(bundle / name), (bundle / name).stat().st_size) for name in manifest.files
    }
    replace(manifest, files=files).write(bundle)


def test_an_altered_graph_is_told_from_the_others(altered: Path, tiny_model: Path) -> None:
    with pytest.raises(BundleError, match="detector/model.onnx"):
        verify_bundle(altered, tiny_model)
    rehash(altered)
    result = CliRunner().invoke(main, ["verify", str(altered), "--model", str(tiny_model), "--json"])
    rows = json.loads(result.stdout)
    assert result.exit_code == 1
    assert {row["graph"] for row in rows if not row["ok"]} == {"detector"}
    assert all(row["max_abs_err"] > row["tol"] for row in rows if not row["ok"])
    assert len([row for row in rows if row["ok"]]) == 2 * (len(GRAPHS) - 1)


def test_the_table_names_what_is_wrong(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Manifest.load(tiny_bundle).verification[0]
    rows = (row, replace(row, max_abs_err=math.inf, tol=0.0, ok=False))
    monkeypatch.setattr(verify, "verify_bundle", lambda *_: rows)
    result = CliRunner().invoke(main, ["verify", str(tiny_bundle)])
    lines = result.stdout.splitlines()
    assert result.exit_code == 1 and [line.split()[-1] for line in lines] == ["ok", "yes", "NO"]
    result = CliRunner().invoke(main, ["verify", str(tiny_bundle), "--json"])
    assert json.loads(result.stdout)[1]["max_abs_err"] is None and "Infinity" not in result.stdout


def test_another_model_is_refused_by_the_file_that_differs(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["quant_conv.bias"] += 1
    save_file(tensors, file)
    with pytest.raises(
        BundleError, match=r"other/vae/diffusion_pytorch_model.safetensors is not what .* made from"
    ):
        verify_bundle(tiny_bundle, model)
    shutil.rmtree(model / "unet_one_step")
    with pytest.raises(
        BundleError, match="other/unet_one_step/diffusion_pytorch_model.safetensors is not what"
    ):
        verify_bundle(tiny_bundle, model)


def test_the_model_is_found_by_its_name_or_asked_for(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=f"was made from '{tiny_model.name}', .* name it with --model DIR"):
        verify_bundle(tiny_bundle, None)
    found = []
    monkeypatch.setattr(verify, "compare", lambda bundle, folder: found.append(folder.path) or ())
    monkeypatch.chdir(tiny_model.parent)
    assert verify_bundle(tiny_bundle, None) == () and found == [Path(tiny_model.name)]


def test_the_shipped_bundle_says_where_its_model_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "MODEL_FOLDER", tmp_path / "none")
    with pytest.raises(BundleError, match="shapes was made from models/shapes/model of .*--model"):
        verify_bundle(Path("shapes"), None)
    found = []
    monkeypatch.undo()
    monkeypatch.setattr(verify, "MODEL_FOLDER", CHECKOUT)
    monkeypatch.setattr(verify, "compare", lambda bundle, folder: found.append(folder.path) or ())
    assert verify_bundle(Path("shapes"), None) == () and found == [CHECKOUT]


def test_inputs_are_of_the_kind_a_request_gives(tiny_bundle: Path) -> None:
    manifest = open_bundle(tiny_bundle).manifest
    tokens = manifest.tokens
    given = draw(manifest.graphs["detector"], manifest, Case({"requests": 7, "probes": 3}))
    ids, mask = given["input_ids"], given["rotate_mask"]
    counts = mask.sum(1)
    assert len(set(counts)) > 1 and (ids[:, 0] == tokens.bos).all() and not mask[:, 0].any()
    for row, count in enumerate(counts):
        assert mask[row, 1 : count + 1].all() and ids[row, count + 1] == tokens.eos
        assert (ids[row, count + 2 :] == tokens.pad).all()
    assert (given["angle"][:, 0] == 0).all() and (given["angle"][:, 1:] > 0).all()
    assert given["need"].min() >= 1 and given["need"].max() <= 4
    again = draw(manifest.graphs["detector"], manifest, Case({"requests": 7, "probes": 3}))
    assert all(np.array_equal(given[name], again[name]) for name in given)


def outputs(probes: int = 4) -> dict[str, np.ndarray]:
    """A detector's outputs on one request: margins just above 0, far above, and twice far below."""
    margins = np.full((1, probes, 2), -0.5, np.float32)
    margins[0, 0, 1], margins[0, 1, 0] = 1e-5, 0.4
    flagged = (margins > 0).any(-1)
    return {
        "margins": margins,
        "flagged": flagged,
        "finite": np.ones((1, probes), bool),
        "score": flagged.mean(-1, dtype=np.float32),
        "blocked": np.ones(1, bool),
        "images": np.full((1, probes, 3, 2, 2), 0.5, np.float32),
    }


def changed(name: str, index: tuple, value: float) -> dict[str, np.ndarray]:
    found = outputs()
    found[name][index] = value
    return found


ONE = Case({"requests": 1, "probes": 4})
FAR = np.ones((1, 4), np.float32)  # no special-care concept is near its threshold


@pytest.mark.parametrize(
    ("found", "ok"),
    [
        (outputs(), True),
        (changed("margins", (0, 2, 0), -0.5 + 0.9 * TOLERANCE["detector"]), True),
        (changed("margins", (0, 2, 0), -0.5 + 1.1 * TOLERANCE["detector"]), False),
        (changed("margins", (0, 2, 0), np.nan), False),
        (changed("images", (0, 3, 1, 1, 0), 0.5 + 0.9 * IMAGES), True),
        (changed("images", (0, 3, 1, 1, 0), 0.5 + 1.1 * IMAGES), False),
        (changed("flagged", (0, 0), False), True),  # its margin lies within the tolerance of 0
        (changed("flagged", (0, 1), False), False),
        (changed("flagged", (0, 2), True), False),
        (changed("finite", (0, 0), False), False),
        (changed("score", (0,), 0.25), True),  # one of the four may fall either way
        (changed("blocked", (0,), False), True),
    ],
)
def test_a_difference_counts_unless_a_tie_explains_it(found: dict[str, np.ndarray], ok: bool) -> None:
    assert compare_outputs("detector", ONE, Truth(outputs(), FAR), found).ok is ok


@pytest.mark.parametrize(("name", "index", "value"), [("score", (0,), 0.25), ("blocked", (0,), False)])
def test_a_vote_without_a_tie_must_be_equal(name: str, index: tuple, value: float) -> None:
    expected, found = outputs(), changed(name, index, value)
    for given in (expected, found):
        given["margins"][0, 0, 1] = 0.3
    row = compare_outputs("detector", ONE, Truth(expected, FAR), found)
    assert not row.ok and row.max_abs_err > row.tol == 0.0


def test_a_special_care_concept_near_its_threshold_excuses_its_own_probe() -> None:
    moved = outputs()
    moved["margins"][0, 2] += 0.01
    near = FAR.copy()
    near[0, 2] = 0.5 * TOLERANCE["detector"]
    assert compare_outputs("detector", ONE, Truth(outputs(), near), moved).ok
    assert not compare_outputs("detector", ONE, Truth(outputs(), FAR), moved).ok
    moved["margins"][0, 3] += 0.01
    assert not compare_outputs("detector", ONE, Truth(outputs(), near), moved).ok


def test_a_probe_that_is_not_finite_must_be_flagged_and_no_more() -> None:
    expected = outputs()
    expected["finite"][0, 3], expected["flagged"][0, 3] = False, True
    expected["margins"][0, 3], expected["images"][0, 3] = np.nan, np.nan
    care = FAR.copy()
    care[0, 3] = np.nan
    found = {name: value.copy() for name, value in expected.items()}
    found["margins"][0, 3], found["images"][0, 3] = 0.0, 0.0
    assert compare_outputs("detector", ONE, Truth(expected, care), found).ok
    found["flagged"][0, 3] = False
    assert not compare_outputs("detector", ONE, Truth(expected, care), found).ok


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_reference_that_is_not_finite_is_no_reference(value: float) -> None:
    one = {"sample": np.array([[1.0, value]], np.float32)}
    row = compare_outputs("vae_decoder", Case({"batch": 1}), Truth(one, None), one)
    assert not row.ok and row.max_abs_err == math.inf


def test_a_poisoned_case_is_not_finite_in_the_reference(tiny_bundle: Path, tiny_model: Path) -> None:
    from safelight.engine.eager import load_graph

    manifest = open_bundle(tiny_bundle).manifest
    given = draw(manifest.graphs["detector"], manifest, Case({"requests": 1, "probes": 2}, poisoned=True))
    with torch.inference_mode():
        found = load_graph(tiny_model, "detector")(*(torch.from_numpy(value) for value in given.values()))
    assert found[2].tolist() == [[True, False]] and found[1][0, 1] and bool(found[4])
