"""The manifest: the same value gives the same bytes, and a bundle that is not what it says is not opened."""

import dataclasses
import io
import json
import os
import re
import runpy
import shutil
from pathlib import Path

import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.errors import BundleError
from safelight.manifest import MANIFEST, REQUIRED_FILES, REQUIRED_GRAPHS, FileEntry, Manifest, Row
from safelight.probe import ProbeConfig

HAND = runpy.run_path(str(Path(__file__).with_name("handmade.py")))
edit, plain, seal = HAND["edit"], HAND["plain"], HAND["seal"]
FOLDERS = sorted({name.partition("/")[0] for name in (*HAND["FILES"], *(f"{g}/" for g in HAND["GRAPHS"]))})
KEPT = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "bundle"
    HAND["build"](folder)
    return folder


@pytest.fixture
def bundle(made, tmp_path):
    """A fresh copy for a test to spoil."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    """No library sees a bundle before it is checked."""

    def opened(*args, **named):
        raise RuntimeError("a bundle was opened before it was checked")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)


def refused(folder, *words, **options):
    """The one line with which `folder` is refused; it holds all `words`."""
    with pytest.raises(BundleError) as caught:
        Manifest.load(folder, **options)
    message = str(caught.value)
    assert message.isprintable(), f"not one printable line: {message!r}"
    for word in (*words, ";"):  # what is wrong; what to do
        assert word in message
    return message


def test_a_round_trip_gives_the_same_value_and_the_same_bytes(made):
    loaded = Manifest.load(made)
    assert loaded == HAND["manifest_of"](made)
    assert loaded.to_bytes() == (made / MANIFEST).read_bytes()
    again = Manifest.from_json(json.loads(loaded.to_bytes()))
    assert (again, again.bundle_id) == (loaded, loaded.bundle_id)


def test_the_order_of_files_and_keys_does_not_change_the_bytes(made):
    values = plain(made)
    turned = values | {"files": dict(reversed(values["files"].items()))}
    turned = dict(reversed(turned.items()))
    assert Manifest.from_json(turned).to_bytes() == Manifest.from_json(values).to_bytes()


def test_the_bundle_id_changes_with_any_file(made):
    loaded = Manifest.load(made)
    assert re.fullmatch(r"[0-9a-f]{16}", loaded.bundle_id)
    ids = {loaded.bundle_id}
    for name, entry in loaded.files.items():
        for other in (
            FileEntry("0" * 64, entry.size_bytes),
            FileEntry(entry.sha256, entry.size_bytes + 1),
        ):
            ids.add(dataclasses.replace(loaded, files=dict(loaded.files) | {name: other}).bundle_id)
    assert len(ids) == 1 + 2 * len(loaded.files)


def test_a_calibration_replaces_the_probe_defaults_and_nothing_else(bundle):
    before = Manifest.load(bundle)
    after = before.with_calibration(ProbeConfig(count=16), {"fpr": 0.01, "prompts": 300}, rotate="tokens")
    after.write(bundle)
    loaded = Manifest.load(bundle)
    assert (loaded.probe.count, loaded.rotate, loaded.calibration) == (
        16,
        "tokens",
        {"fpr": 0.01, "prompts": 300},
    )
    changed = {
        item.name
        for item in dataclasses.fields(before)
        if getattr(before, item.name) != getattr(loaded, item.name)
    }
    assert changed == {"probe", "rotate", "calibration"} and loaded.bundle_id != before.bundle_id


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "int8"},
        {"rotate": "pad"},
        {"guidance_scale": float("nan")},
        {"guidance_scale": -1.0},
        {"files": {}},
    ],
)
def test_values_out_of_range_are_refused(made, change):
    with pytest.raises(ValueError):
        HAND["manifest_of"](made, **change)


def test_the_infinities_of_a_diffusers_scheduler_do_not_stop_an_export(bundle):
    config = {
        "_class_name": "DPMSolverMultistepScheduler",
        "lambda_min_clipped": -float("inf"),
        "beta_end": 0.012,
    }
    made = seal(bundle, scheduler=config)
    assert Manifest.load(bundle).scheduler == made.scheduler
    assert made.scheduler == {"_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.012}
    assert made.schedule.solver == "dpmpp_2m"


def test_a_number_that_is_not_finite_is_never_written(bundle):
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(ValueError):
        seal(bundle, verification=(Row("unet", "n=1", float("nan"), 1e-5, False),))
    assert (bundle / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_manifest(bundle, monkeypatch, broken):
    before = (bundle / MANIFEST).read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, broken, full)
        with pytest.raises(OSError, match="No space"):
            seal(bundle, created_by="another")
    assert (bundle / MANIFEST).read_bytes() == before
    assert sorted(path.name for path in bundle.iterdir()) == sorted([MANIFEST, "README.md", *FOLDERS])
    Manifest.load(bundle)


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


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0, [1]])
def test_an_unknown_version(bundle, version):
    edit(bundle, lambda values: values.update(safelight_bundle=version))
    refused(bundle, str(bundle / MANIFEST), f"version {version!r} is unknown", "export the bundle again")


@pytest.mark.parametrize("graph", REQUIRED_GRAPHS)
def test_a_required_graph_is_missing(bundle, graph):
    edit(bundle, lambda values: values["graphs"].pop(graph))
    refused(bundle, str(bundle / MANIFEST), f"names no {graph}", "export again")


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_required_file_is_not_listed(bundle, name):
    (bundle / name).unlink()
    edit(bundle, lambda values: values["files"].pop(name))
    refused(bundle, str(bundle / MANIFEST), f"does not list {name}")


def objects():
    """Where the objects with fixed keys are, by the path of keys to them."""
    yield ()
    yield from ((key,) for key in ("source", "one_step", "tokens", "picture", "checker", "probe"))
    yield ("files", "unet/model.onnx")
    yield ("graphs", "unet")
    yield ("graphs", "unet", "inputs", 0)
    yield ("verification", 0)


def test_a_missing_or_unknown_key_at_any_level(made):
    values = plain(made)
    for at in objects():
        keys = [key for key in inside(values, at) if key != "safelight_bundle"]
        for key in keys:
            spoilt = json.loads(json.dumps(values))
            del inside(spoilt, at)[key]
            assert f"lacks the key {key!r}" in why(spoilt)
        spoilt = json.loads(json.dumps(values))
        inside(spoilt, at)["odd\nkey"] = 1
        assert r"unknown key 'odd\nkey'" in why(spoilt)


def inside(values, at):
    for key in at:
        values = values[key]
    return values


def why(values):
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(values, "here")
    assert str(caught.value).startswith("here") and str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "at",
    [
        ("guidance_scale",),
        ("one_step", "timestep"),
        ("picture", "scaling_factor"),
        ("checker", "mean", 1),
        ("probe", "angle_rad"),
        ("verification", 0, "tol"),
        ("scheduler", "beta_end"),
        ("calibration", "curve", 0),
    ],
)
def test_a_number_that_is_not_finite_is_refused_at_any_place(made, at, number):
    values = plain(made) | {"calibration": {"curve": [1.0]}}
    inside(values, at[:-1])[at[-1]] = number
    assert "must be finite" in why(values)


def test_a_value_of_another_type_at_any_place(made):
    """Every leaf and every container is replaced by values of all other types."""
    values = plain(made)
    free = {"scheduler", "calibration", "safelight_bundle"}

    def places(value, at=()):
        yield at
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, item in items:
            if at or key not in free:
                yield from places(item, (*at, key))

    tried = 0
    for at in [place for place in places(values) if place]:
        old = inside(values, at)
        for new in (None, True, "x" * 65, 1.5, [[1]], {"x": {}}, float("nan")):
            if (
                type(new) is type(old)
                or (isinstance(old, float | int) and new == 1.5)
                or (old, new) == ("a1b2", None)
            ):
                continue
            if at[-2:-1] == ("axes",) and isinstance(new, str):
                continue
            spoilt = json.loads(json.dumps(values))
            inside(spoilt, at[:-1])[at[-1]] = new
            try:
                Manifest.from_json(spoilt, "here")
            except BundleError as fault:
                assert str(fault).isprintable()
                tried += 1
            else:
                pytest.fail(f"{at} = {new!r} in place of {old!r} was accepted")
    assert tried > 300


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../outside.json", "unet/../../x.json", ".hidden.json", "unet/.x/y.json"),
        *(
            "unet\\model.json",
            "a b.json",
            "a\nb.json",
            "a\x1b[31m.json",
            "é.json",
            "",
            "unet/",
            "unet//x.json",
        ),
        *("/".join("abcdefghi"), "a" * 200),
    ],
)
def test_an_odd_file_name(bundle, name):
    edit(bundle, lambda values: values["files"].update({name: {"sha256": "0" * 64, "size_bytes": 1}}))
    refused(bundle, str(bundle / MANIFEST), repr(name), "not a path inside the bundle")


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
        (b"", "not the JSON it must be"),
        (b"\xff{}", "not the JSON it must be"),
        (b"[]", "must hold a JSON object"),
        (b'{"safelight_bundle": 1, "safelight_bundle": 1}', "a key occurs twice"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "not the JSON it must be"),
        (b'{"a": "' + b"x" * (16 << 20) + b'"}', "larger than 16 MiB"),
        (b'{"safelight_bundle": 1' + b"0" * 5000 + b"}", "not the JSON it must be"),
    ],
    ids=["empty", "not utf-8", "list", "twice", "deep", "very deep", "large", "huge number"],
)
def test_a_manifest_that_is_not_json(bundle, content, word):
    (bundle / MANIFEST).write_bytes(content)
    refused(bundle, str(bundle / MANIFEST), word)


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
def test_any_flip_in_the_manifest_is_accepted_or_refused_in_one_line(bundle, data):
    """Never another exception; and what is accepted still writes bytes and an id."""
    whole = HAND["manifest_of"](bundle).to_bytes()
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (bundle / MANIFEST).write_bytes(content)
    try:
        loaded = Manifest.load(bundle)
    except BundleError as fault:
        assert str(fault).isprintable() and str(bundle) in str(fault)
    else:
        assert Manifest.from_json(json.loads(loaded.to_bytes())) == loaded


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
