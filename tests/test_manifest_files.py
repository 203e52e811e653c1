"""The files of a bundle: one that is not what its manifest says is not opened."""

import io
import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.manifest import MANIFEST, REQUIRED_FILES, FileEntry, Manifest

SPOILT = runpy.run_path(str(Path(__file__).with_name("spoilt.py")))
made, bundle, _nothing_is_loaded = (SPOILT[name] for name in ("made", "bundle", "_nothing_is_loaded"))
HAND, edit, plain, seal, refused = (SPOILT[name] for name in ("HAND", "edit", "plain", "seal", "refused"))
KEPT = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_a_path_that_is_no_bundle(tmp_path):
    refused(tmp_path / "none", str(tmp_path / "none"), "safelight export")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "not a bundle folder")
    refused(tmp_path, f"{tmp_path / MANIFEST} is missing", "export the bundle again")


@pytest.mark.parametrize("name", [*REQUIRED_FILES, "unet/model.onnx", "unet/model.onnx_data", MANIFEST])
def test_a_missing_file(bundle, name):
    (bundle / name).unlink()
    refused(bundle, f"{bundle / name} is missing", "export the bundle again")


@pytest.mark.parametrize("name", ["unet/model.onnx", "unet/model.onnx_data", "tokenizer/merges.txt"])
def test_an_altered_byte_of_the_same_size(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    refused(bundle, f"{bundle / name} was altered", "SHA-256", "export the bundle again")


@pytest.mark.parametrize("length", [0, -1])
def test_a_truncated_file(bundle, length):
    path = bundle / "unet/model.onnx_data"
    path.write_bytes(path.read_bytes()[:length])
    refused(bundle, f"{path} has", "the manifest says 16")
    refused(bundle, f"{path} has", verify="sizes")


def test_verify_sizes_skips_the_digests_alone(bundle):
    path = bundle / "unet/model.onnx_data"
    path.write_bytes(b"x" * 16)
    assert Manifest.load(bundle, verify="sizes") == HAND["manifest_of"](bundle, files=plain_files(bundle))
    refused(bundle, str(path))
    with pytest.raises(ValueError, match="verify must be"):
        Manifest.load(bundle, verify="none")


def plain_files(folder):
    return {name: FileEntry(**entry) for name, entry in plain(folder)["files"].items()}


def test_a_hash_that_does_not_match(bundle):
    edit(bundle, lambda values: values["files"]["unet/model.onnx"].update(sha256="0" * 64))
    refused(bundle, f"{bundle / 'unet/model.onnx'} was altered")


@pytest.mark.parametrize(
    "name",
    ["extra.onnx", "unet/extra.json", "unet/model.safetensors", "a", ".hidden", "unet/.model.onnx.swp"],
)
def test_a_file_that_the_manifest_does_not_list(bundle, name):
    (bundle / name).write_bytes(b"x")
    refused(bundle, f"{bundle / name} is not named in the manifest", "delete it")


@pytest.mark.parametrize("name", ["note.md", "unet/picture.png", "verification.csv"])
def test_notes_may_lie_beside_the_parts(bundle, name):
    (bundle / name).write_bytes(b"x")
    Manifest.load(bundle)


@pytest.mark.parametrize(
    "name", ["a.pkl", "unet/w.PT", "w.bin", "w.npy", "deep/er/run.py", "lib.so", "c.ckpt"]
)
@pytest.mark.parametrize("listed", [False, True])
def test_what_may_hold_code_is_refused_wherever_it_lies(bundle, name, listed):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(b"x")
    if listed:
        seal(bundle)
    refused(bundle, f"{bundle / name} may hold code", "delete it")


def test_a_listed_file_of_another_kind(bundle):
    (bundle / "weights.safetensors").write_bytes(b"x")
    seal(bundle)
    refused(bundle, str(bundle / "weights.safetensors"), "a bundle's parts are")


@pytest.mark.parametrize("name", ["tokenizer/merges.txt", "unet/model.onnx_data", MANIFEST])
def test_a_symbolic_link_in_place_of_a_file(bundle, tmp_path, name):
    moved = tmp_path / "elsewhere"
    (bundle / name).rename(moved)
    (bundle / name).symlink_to(moved)
    refused(bundle, f"{bundle / name} is reached by a symbolic link", "put a copy")
    refused(bundle, str(bundle / name), installed=True)


def test_a_symbolic_link_in_place_of_a_folder(bundle, tmp_path):
    (bundle / "unet").rename(tmp_path / "unet")
    (bundle / "unet").symlink_to(tmp_path / "unet")
    refused(bundle, f"{bundle / 'unet'} is a symbolic link", "put a copy")


def test_a_hard_link_is_only_for_the_installed_bundle(bundle, tmp_path):
    name = "unet/model.onnx_data"
    os.link(bundle / name, tmp_path / "cache")
    refused(bundle, f"{bundle / name} is a hard link", "put a copy")
    Manifest.load(bundle, installed=True)


def test_a_pipe_in_place_of_a_file(bundle):
    path = bundle / "tokenizer/merges.txt"
    path.unlink()
    os.mkfifo(path)
    refused(bundle, f"{path} is not a plain file")


@pytest.mark.parametrize("key", ["path", "external"])
def test_a_graph_that_points_outside(bundle, key):
    outside = "../outside.onnx" if key == "path" else ["../outside.onnx_data"]
    edit(bundle, lambda values: values["graphs"]["unet"].update({key: outside}))
    refused(bundle, str(bundle / MANIFEST), "'../outside.onnx", "not a path inside the bundle")


def test_a_graph_of_files_that_are_not_listed(bundle):
    edit(bundle, lambda values: values["graphs"]["unet"].update(path="unet/other.onnx"))
    refused(bundle, "'unet/other.onnx' belongs to a graph", "not among the files")


def test_an_onnx_file_that_no_graph_uses(bundle):
    shutil.copy(bundle / "detector/model.onnx", bundle / "detector/other.onnx")
    seal(bundle)
    refused(bundle, f"{bundle / 'detector/other.onnx'} belongs to no graph")


@pytest.mark.parametrize(
    "content, word",
    [
        ({"_class_name": "EvilScheduler"}, "'EvilScheduler'"),
        ({"_class_name": ["a", "b"]}, "not on the allow-list"),
        ({"a": [{"b": {"auto_map": {"AutoModel": "evil.Model"}}}]}, "'auto_map'"),
        ({"a": {"custom_pipeline": "evil"}}, "'custom_pipeline'"),
        ({"trust_remote_code": False}, "'trust_remote_code'"),
    ],
)
def test_a_configuration_that_names_code(bundle, content, word):
    name = "scheduler/scheduler_config.json"
    (bundle / name).write_text(json.dumps(content))
    seal(bundle)
    refused(bundle, str(bundle / name), word)


def test_a_graph_is_walked_before_it_is_opened(bundle):
    path = bundle / "detector/model.onnx"
    path.write_bytes(HAND["model"](weights=[HAND["external_tensor"]("/etc/passwd")]).SerializeToString())
    seal(bundle)
    refused(bundle, f"{path} refers to data at '/etc/passwd'")


@KEPT
@given(data=st.data())
def test_any_flip_in_a_graph_is_refused(bundle, data):
    path = bundle / "detector/model.onnx"
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    kept = path.read_bytes()
    path.write_bytes(content)
    refused(bundle, f"{path} was altered")
    path.write_bytes(kept)


def test_no_file_outside_the_bundle_is_read(bundle, monkeypatch):
    """The attack that matters most, once more from the other side: what is opened lies in the folder."""
    opened = []
    real = io.open

    def watched(file, *args, **named):
        opened.append(str(file))
        return real(file, *args, **named)

    monkeypatch.setattr(io, "open", watched)
    edit(bundle, lambda values: values["files"].update({"../x.json": {"sha256": "0" * 64, "size_bytes": 1}}))
    opened.clear()
    refused(bundle, "'../x.json'")
    assert opened and all(Path(name).is_relative_to(bundle) for name in opened)
