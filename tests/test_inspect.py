"""`safelight inspect`: what a bundle says of itself, after every file was compared with the manifest."""

import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from safelight.cli import main
from safelight.manifest import MANIFEST, Checker, Manifest, Row
from safelight.probe import ProbeConfig

HAND = runpy.run_path(str(Path(__file__).with_name("handmade.py")))


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "bundle"
    HAND["build"](folder)
    return folder


def inspect(*arguments):
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def facts(text):
    """The lines before the first empty one, by their first column."""
    lines = text.partition("\n\n")[0].splitlines()
    return {line[:15].strip(): line[16:] for line in lines}


def test_json_is_the_manifest_with_its_id_and_folder(bundle):
    text = inspect(bundle, "--json")
    values = json.loads(text)
    assert text.count("\n") == 1
    assert values.pop("folder") == str(bundle)
    assert values.pop("bundle_id") == Manifest.load(bundle).bundle_id
    assert values == json.loads((bundle / MANIFEST).read_text())


def test_the_facts(bundle):
    manifest = Manifest.load(bundle)
    said = facts(inspect(bundle))
    total = sum(entry.size_bytes for entry in manifest.files.values())
    assert said["bundle"] == str(bundle) and said["id"] == manifest.bundle_id
    assert said["source"] == "models/tiny, revision a1b2"
    assert said["precision"] == "fp32, opset 20"
    assert said["size"] == f"{total} B in {len(manifest.files)} files"
    assert said["tokens"] == "window 32, begin 718, end 719, fill 719"
    assert said["picture"] == "64 px from latents (4, 8, 8), scaling factor 0.9"
    assert (said["concepts"], said["special care"], said["defences"]) == ("star", "none", "none")
    assert said["probe"] == "8 spherical of the prompt at 0.600 rad, turning tokens+eos"
    assert said["policy"] == "blocked from 2 of 8 flagged (threshold 0.25)"
    assert "a guess" in said["calibration"]


def test_every_tensor_of_every_graph_has_a_line(bundle):
    lines = inspect(bundle).split("\n\n")[1].splitlines()[1:]
    assert len(lines) == 2 * len(HAND["GRAPHS"])
    unet = next(index for index, line in enumerate(lines) if line.startswith("unet "))
    size = sum((bundle / "unet" / name).stat().st_size for name in ("model.onnx", "model.onnx_data"))
    assert lines[unet].split() == ["unet", str(size), "B", "in", "x", "float32", "(n,", "4)"]
    assert lines[unet + 1].split() == ["out", "y", "float32", "(n,", "4)"]


def test_a_calibration_is_shown_by_its_figures(bundle):
    tune = {"need": 8, "fpr": 0.0123456, "fpr_95": [0.001, 0.03], "odd": {}}
    calibration = {"target_fpr": 0.02, "rule": "widest", "curve": [tune, tune, tune], "tune": tune}
    calibration |= {"held_out": {"odd": tune, "new": {"tpr": 0.5}}}
    manifest = Manifest.load(bundle)
    probe = ProbeConfig(kind="token_shift", count=16, threshold=0.5)
    manifest.with_calibration(probe, calibration).write(bundle)
    said = facts(inspect(bundle))
    assert said["calibration"] == "rule widest, target_fpr 0.02"
    assert said["held_out new"] == "tpr 0.5" and "held_out" not in said
    assert said["tune"] == said["held_out odd"] == "fpr 0.01235, fpr_95 [0.001, 0.03], need 8"
    assert said["probe"] == "16 token_shift of the prompt, turning tokens+eos"
    assert said["policy"].startswith("blocked from 8 of 16")


def test_a_latent_probe_turns_no_tokens(bundle):
    manifest = Manifest.load(bundle)
    manifest.with_calibration(ProbeConfig(target="latent"), {}).write(bundle)
    assert facts(inspect(bundle))["probe"] == "8 spherical of the latent at 0.600 rad"


def test_the_verification_is_a_table_and_a_failed_row_is_loud(bundle):
    rows = (Row("unet", "n=1", 1e-7, 1e-5, True), Row("detector", "R=3 P=5", 0.25, 1e-5, False))
    HAND["seal"](bundle, verification=rows)
    lines = inspect(bundle).split("\n\n")[2].splitlines()
    assert [line.split()[-1] for line in lines] == ["ok", "yes", "NO"]
    assert lines[2].split() == ["detector", "R=3", "P=5", "2.50e-01", "1.00e-05", "NO"]
    HAND["seal"](bundle, verification=())
    assert "safelight verify" in inspect(bundle).split("\n\n")[2]


def test_the_manifests_texts_cannot_reach_the_terminal(bundle):
    checker = Checker(48, (0.5,) * 3, (0.25,) * 3, ("star\x1b[2J", "a\nverification  fine"), ("\u202e",))
    HAND["seal"](bundle, checker=checker, defences=("sdd\r",), created_by="x\x07")
    text = inspect(bundle)
    assert all(line.isprintable() for line in text.splitlines()) and "\x1b" not in text
    assert facts(text)["concepts"] == "star [2J, a verification  fine"


@pytest.mark.parametrize(
    "size, shown", [(999, "999 B"), (1000, "1.0 kB"), (123_456_789, "123.5 MB"), (0, "0 B")]
)
def test_sizes_are_decimal(bundle, size, shown):
    from safelight.cli.inspection import describe
    from safelight.manifest import FileEntry

    manifest = HAND["manifest_of"](bundle)
    files = {name: FileEntry(entry.sha256, 0) for name, entry in manifest.files.items()}
    files["unet/model.onnx"] = FileEntry("0" * 64, size)
    made = HAND["manifest_of"](bundle, files=files)
    assert facts("\n".join(describe(bundle, made)))["size"] == f"{shown} in {len(files)} files"


def test_shapes_is_the_bundle_in_the_package_and_may_be_hard_linked(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("safelight.engine.bundle.BUNDLE_FOLDER", bundle)
    os.link(bundle / "unet/model.onnx", tmp_path / "cache")
    assert json.loads(inspect("--json")) == json.loads(inspect("shapes", "--json"))
    assert json.loads(inspect("--json"))["folder"] == str(bundle)
    refused(bundle, "is a hard link")


def refused(folder, *words):
    for arguments in ([str(folder)], [str(folder), "--json"]):
        result = CliRunner().invoke(main, ["inspect", *arguments])
        assert (result.exit_code, result.stdout) == (2, "")
        line = result.stderr.removesuffix("\n")
        assert line.startswith("safelight: ") and line.isprintable(), repr(line)
        for word in words:
            assert word in line


def altered(folder):
    (folder / "unet/model.onnx_data").write_bytes(b"x" * 16)
    return "unet/model.onnx_data was altered"


def truncated(folder):
    (folder / "unet/model.onnx_data").write_bytes(b"x")
    return "unet/model.onnx_data has 1 bytes"


def missing(folder):
    (folder / "tokenizer/merges.txt").unlink()
    return "tokenizer/merges.txt is missing"


def without_manifest(folder):
    (folder / MANIFEST).unlink()
    return f"{MANIFEST} is missing"


def unlisted(folder):
    (folder / "more.json").write_text("{}")
    return "more.json is not named in the manifest"


def pickled(folder):
    (folder / "unet/weights.pkl").write_bytes(b"x")
    return "unet/weights.pkl may hold code"


def linked(folder):
    shutil.move(folder / "unet", folder.parent / "unet")
    (folder / "unet").symlink_to(folder.parent / "unet")
    return "unet is a symbolic link"


def of_another_version(folder):
    HAND["edit"](folder, lambda values: values.update(safelight_bundle=2))
    return "version 2 is unknown"


def with_a_key_more(folder):
    HAND["edit"](folder, lambda values: values.update({"a\nb\x1b": 1}))
    return r"unknown key 'a\nb\x1b'"


def without_a_checker(folder):
    HAND["edit"](folder, lambda values: values["graphs"].pop("safety_checker"))
    return "names no safety_checker"


def not_json(folder):
    (folder / MANIFEST).write_text("{")
    return "not the JSON"


def pointing_outside(folder):
    made = HAND["model"](weights=[HAND["external_tensor"]("../../secret")])
    (folder / "detector/model.onnx").write_bytes(made.SerializeToString())
    HAND["seal"](folder)
    return "refers to data at '../../secret'"


def not_onnx(folder):
    (folder / "detector/model.onnx").write_bytes(b"garbage")
    HAND["seal"](folder)
    return "detector/model.onnx is not an ONNX file"


def importing(folder):
    (folder / "tokenizer/tokenizer_config.json").write_text('{"auto_map": {}}')
    HAND["seal"](folder)
    return "'auto_map' asks for code"


def oddly_named(folder):
    (folder / "a\n\x1b[31m.md").write_text("")
    return "holds the odd name"


@pytest.mark.parametrize(
    "spoil",
    [
        *(altered, truncated, missing, without_manifest, unlisted, pickled, linked, of_another_version),
        *(with_a_key_more, without_a_checker, not_json, pointing_outside, not_onnx, importing, oddly_named),
    ],
)
def test_a_bad_bundle_is_one_sentence_and_exit_code_2(bundle, spoil):
    refused(bundle, spoil(bundle), str(bundle))


def test_a_folder_that_is_no_bundle(tmp_path):
    refused(tmp_path / "none", "is not a bundle folder", "safelight export")
