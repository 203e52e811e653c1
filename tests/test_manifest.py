"""The manifest: the same value gives the same bytes, and one that is not well formed is refused."""

import dataclasses
import json
import os
import re
import runpy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.errors import BundleError
from safelight.manifest import MANIFEST, REQUIRED_FILES, REQUIRED_GRAPHS, FileEntry, Manifest, Row
from safelight.probe import ProbeConfig

SPOILT = runpy.run_path(str(Path(__file__).with_name("spoilt.py")))
made, bundle, _nothing_is_loaded = (SPOILT[name] for name in ("made", "bundle", "_nothing_is_loaded"))
HAND, edit, plain, seal, refused = (SPOILT[name] for name in ("HAND", "edit", "plain", "seal", "refused"))
FOLDERS = sorted({name.partition("/")[0] for name in (*HAND["FILES"], *(f"{g}/" for g in HAND["GRAPHS"]))})
KEPT = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


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
