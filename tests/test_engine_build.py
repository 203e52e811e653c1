"""Engines are built for real, with TensorRT-RTX and no GPU, and what goes wrong is made to happen."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from safelight.cli import main
from safelight.containment import digest
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.engines.find import find_engine
from safelight.engine.engines.flavour import RTX, choose_flavour
from safelight.engine.engines.lock import locked
from safelight.engine.engines.store import PLAN, read_plan, read_record
from safelight.errors import BackendUnavailable, BundleError, ExportError
from safelight.export.engines import build as building
from safelight.export.engines.build import Built, build_engine, check_target
from safelight.export.engines.profiles import profile, usual_batches
from safelight.manifest import FileEntry, GraphEntry, TensorSpec
from safelight.models.shapes import BUNDLE_FOLDER

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed"
)
SMALL = "latent_checker"  # the graph that is built fastest


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped bundle in a folder of its own; tests that need an engine build it into this one."""
    return Path(shutil.copytree(BUNDLE_FOLDER, tmp_path_factory.mktemp("built") / "bundle"))


@pytest.fixture(scope="module")
def shared(original: Path) -> Bundle:
    return open_bundle(original, engine_key=original.parent / "engine.key")


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Bundle:
    """The bundle without engines, in a folder that the test may spoil."""
    folder = tmp_path / "bundle"
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("engines"))
    return open_bundle(folder, engine_key=original.parent / "engine.key")


def build(bundle: Bundle, graph: str = SMALL, batches=(1,), told: list | None = None, **other) -> Built:
    flavour = choose_flavour(RTX)
    entry = bundle.manifest.graphs[graph]
    settings = {
        "flavour": flavour,
        "target": "sm_89",
        "precision": "fp32",
        "profile": profile(entry, batches),
    }
    tell = [] if told is None else told
    return build_engine(
        bundle, graph, **(settings | other), progress=lambda step, share=None: tell.append((step, share))
    )


def left(bundle: Bundle) -> list[str]:
    """Everything in the store but finished engines and timings."""
    engines = bundle.folder / "engines"
    names = os.listdir(engines) if engines.exists() else []
    return [name for name in names if name != "timing" and len(name) != 64]


@pytest.mark.parametrize(
    ("graph", "precision", "batches"),
    [
        ("text_encoder", "fp16", (1, 4)),
        ("safety_checker", "fp16", (1,)),
        ("vae_decoder", "fp16", (1,)),
        ("redirector", "bf16", (3,)),
        ("latent_checker", "fp32", (1, 2, 8)),
        ("detector", "fp16", (8,)),
    ],
)
def test_a_graph_becomes_an_engine_that_is_found(
    shared: Bundle, graph: str, precision: str, batches: tuple[int, ...]
) -> None:
    told: list = []
    built = build(shared, graph, batches, told, precision=precision)
    assert built.fresh and left(shared) == []
    record = read_record(built.folder, (shared.engine_key).read_bytes())
    assert record == built.record and len(read_plan(built.folder, record)) == record.size_bytes > 100_000
    assert record.parts.fingerprint == built.folder.name and record.build_s > 0
    assert 50e6 < record.peak_bytes < 4e9
    assert (record.agreement is None) == (precision == "fp32")
    shares = [share for _, share in told if share is not None]
    assert shares == sorted(shares) and shares[0] < 0.2 and 0.7 < shares[-1] <= 1
    found = find_engine(shared, graph, flavours=(choose_flavour(RTX),), target="sm_89")
    assert found.folder == built.folder
    again = build(shared, graph, batches, precision=precision)
    assert not again.fresh and again.record == record
    open_bundle(shared.folder)


def test_two_targets_are_two_engines(shared: Bundle) -> None:
    one, two = build(shared), build(shared, target="sm_120")
    assert one.folder != two.folder and one.record.engine_sha256 != two.record.engine_sha256


def test_an_altered_engine_is_built_again(bundle: Bundle) -> None:
    built = build(bundle)
    with (built.folder / PLAN).open("r+b") as file:
        file.write(b"xxxx")
    again = build(bundle)
    assert again.fresh and again.folder == built.folder
    read_plan(again.folder, again.record)


def test_an_engine_is_built_anew_where_that_is_asked_for(bundle: Bundle) -> None:
    first = build(bundle)
    again = build(bundle, anew=True)
    assert again.fresh and again.folder == first.folder and again.record.built_at > first.record.built_at
    read_plan(again.folder, again.record)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_that_was_swapped_after_the_bundle_was_opened_is_not_signed(
    bundle: Bundle, precision: str
) -> None:
    """Same size, other weights: what a manifest's sizes do not show."""
    path = bundle.graph(SMALL)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="was altered since it was exported; export the bundle again"):
        build(bundle, precision=precision)
    assert not (bundle.folder / "engines").exists()


def test_what_a_killed_builder_left_goes_with_the_next_build_of_anything(bundle: Bundle) -> None:
    engines = bundle.folder / "engines"
    dead, alive = (engines / f"{digit * 64}.partial" for digit in "12")
    for partial in (dead, alive):
        partial.mkdir(parents=True, mode=0o700)
        (partial / "model.onnx_data").write_bytes(b"gigabytes")
    engines.chmod(0o700)
    with locked(alive.with_suffix(".lock")):
        build(bundle)
        assert not dead.exists() and alive.exists()
        assert sorted(left(bundle)) == [alive.with_suffix(".lock").name, alive.name]


def test_a_store_that_is_open_to_others_is_not_built_into(bundle: Bundle) -> None:
    (bundle.folder / "engines").mkdir(mode=0o777)
    (bundle.folder / "engines").chmod(0o777)
    (bundle.folder / "engines" / "0.lock").touch()
    with pytest.raises(BundleError, match="open to others"):
        build(bundle)


def test_another_version_of_the_library_builds_beside_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    flavour = choose_flavour(RTX)
    old = replace(flavour, version="1.6.0")
    first = build(bundle, flavour=old)
    with pytest.raises(BackendUnavailable, match=r"differs in version of TensorRT \(1\.6\.0, here 1\.\d"):
        find_engine(bundle, SMALL, flavours=(flavour,), target="sm_89")
    second = build(bundle)
    assert second.fresh and first.folder != second.folder
    assert find_engine(bundle, SMALL, flavours=(flavour,), target="sm_89").folder == second.folder
    assert find_engine(bundle, SMALL, flavours=(old,), target="sm_89").folder == first.folder


# a builder in a process of its own, that the test can kill, starve, or run twice
BUILDER = """
import sys
from pathlib import Path
from safelight.engine.bundle import open_bundle
from safelight.engine.engines.flavour import RTX, choose_flavour
from safelight.errors import SafelightError
from safelight.export.engines.build import build_engine
from safelight.export.engines.profiles import profile
folder, graph = sys.argv[1:3]
bundle = open_bundle(folder, engine_key=Path(sys.argv[3]))
try:
    made = build_engine(bundle, graph, flavour=choose_flavour(RTX), target="sm_89", precision="fp32",
        profile=profile(bundle.manifest.graphs[graph], (1,)),
        progress=lambda step, share=None: print(step if share is None else "building", flush=True))
    print("fresh" if made.fresh else "found", flush=True)
except SafelightError as fault:
    print("refused", fault, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def builder(bundle: Bundle, graph: str = SMALL, **options) -> subprocess.Popen:
    command = [sys.executable, "-P", "-c", BUILDER, str(bundle.folder), graph, str(bundle.engine_key)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def until(process: subprocess.Popen, word: str) -> None:
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"the builder ended before it said {word!r}: {process.stderr.read()}")


def test_two_builders_at_once_build_once(bundle: Bundle) -> None:
    said = []
    both = [builder(bundle, "text_encoder") for _ in range(2)]
    for process in both:
        said.append(process.communicate(timeout=120)[0])
    assert sorted(text.split()[-1] for text in said) == ["found", "fresh"], said
    assert left(bundle) == []


def test_an_interrupt_leaves_nothing(bundle: Bundle) -> None:
    process = builder(bundle, "vae_decoder")
    until(process, "building")
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0].split()[-1] == "interrupted"
    assert time.monotonic() - start < 20
    assert not (bundle.folder / "engines").exists()


def test_a_killed_builder_leaves_nothing_that_counts(bundle: Bundle) -> None:
    process = builder(bundle, "vae_decoder")
    until(process, "building")
    process.kill()
    process.wait()
    assert any(name.endswith(".partial") for name in left(bundle))
    open_bundle(bundle.folder)
    with pytest.raises(BackendUnavailable, match="no engine of vae_decoder"):
        find_engine(bundle, "vae_decoder", flavours=(choose_flavour(RTX),), target="sm_89")
    again = builder(bundle, "vae_decoder")
    assert again.communicate(timeout=120)[0].split()[-1] == "fresh"
    assert left(bundle) == []


def test_a_full_disk_leaves_nothing(bundle: Bundle) -> None:
    """The system lets no file of the builder grow past 200 kB, as a full disk would not."""
    most = 200_000
    process = builder(bundle, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    said = process.communicate(timeout=60)[0]
    assert "refused" in said and "files may not grow" in said and "free some space" in said, said
    assert not (bundle.folder / "engines").exists()


def _no_override() -> None:
    """Root, too, must ask for permission: without CAP_DAC_OVERRIDE in what a new program may have."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)


def test_a_read_only_bundle_is_a_sentence(bundle: Bundle) -> None:
    bundle.folder.chmod(0o555)
    try:
        said = builder(bundle, preexec_fn=_no_override).communicate(timeout=60)[0]
    finally:
        bundle.folder.chmod(0o755)
    assert "refused" in said and "copy the bundle to a folder of your own" in said, said


def with_graph(bundle: Bundle, model: onnx.ModelProto) -> Bundle:
    """The bundle with another file as its latent checker, sealed anew."""
    path = bundle.graph(SMALL)
    onnx.save(model, path)
    name = bundle.manifest.graphs[SMALL].path
    entry = FileEntry(digest(path), path.stat().st_size)
    replace(bundle.manifest, files=bundle.manifest.files | {name: entry}).write(bundle.folder)
    return open_bundle(bundle.folder, engine_key=bundle.engine_key)


def test_an_operator_that_tensorrt_lacks_is_named_with_its_node(bundle: Bundle) -> None:
    model = onnx.load(bundle.graph(SMALL))
    first = model.graph.node[-1]
    made, first.output[0] = first.output[0], "before"
    model.graph.node.append(onnx.helper.make_node("Det", ["before"], [made], name="the_odd_node"))
    broken = with_graph(bundle, model)
    with pytest.raises(ExportError, match=r"cannot take .*the_odd_node.*Det"):
        build(broken)
    assert not (broken.folder / "engines").exists()


CRASHES = {"an abort": "kill -ABRT $$", "an out-of-memory kill": "kill -KILL $$", "an exit": "exit 3"}
CODES = {"an abort": "-6", "an out-of-memory kill": "-9, killed: too little memory?", "an exit": "3"}


@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_of_the_compiler_is_a_sentence(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{CRASHES[crash]}\n")
    script.chmod(0o755)
    monkeypatch.setattr(building.sys, "executable", str(script))
    with pytest.raises(ExportError, match=f"ended with {CODES[crash]}".replace("?", r"\?")):
        build(bundle)
    assert not (bundle.folder / "engines").exists()


def test_a_library_that_cannot_be_imported_says_so(bundle: Bundle) -> None:
    broken = replace(choose_flavour(RTX), module="tensorrt_rtx_that_lacks_a_library")
    with pytest.raises(
        ExportError, match="cannot be imported .*tensorrt_rtx_that_lacks_a_library.*pip install"
    ):
        build(bundle, flavour=broken)
    assert not (bundle.folder / "engines").exists()


def test_what_the_bindings_raise_is_the_reason_that_is_told(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_of_tomorrow.py").write_text(
        "class ILogger: pass\n"
        "class Builder:\n"
        "    def __init__(self, logger): raise TypeError('one more argument')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(ExportError, match=r"TensorRT failed \("):
        build(bundle, flavour=replace(choose_flavour(RTX), module="tensorrt_of_tomorrow"))
    assert not (bundle.folder / "engines").exists()


def test_unknown_targets_and_graphs_are_refused(shared: Bundle) -> None:
    flavour = choose_flavour(RTX)
    assert check_target("sm_89", flavour) == "sm_89"
    with pytest.raises(ValueError, match=r"target must be one of sm_75.*; got 'sm_90'"):
        check_target("sm_90", flavour)
    with pytest.raises(BundleError, match="has no lettering; it has"):
        build_engine(
            shared,
            "lettering",
            flavour=flavour,
            target="sm_89",
            precision="fp32",
            profile=profile(shared.manifest.graphs[SMALL], (1,)),
            progress=lambda step, share=None: None,
        )


def test_full_tensorrt_builds_for_the_gpu_at_hand_alone() -> None:
    full = replace(choose_flavour(RTX), name="tensorrt")
    with pytest.raises(BackendUnavailable, match="takes a GPU|not for sm_75"):
        check_target("sm_75", full)


@pytest.mark.parametrize("batches", [(), (0,), (2, 1), (1, 1), (1, 2000)])
def test_batches_must_ascend(shared: Bundle, batches: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="batches must ascend from 1 to at most 1024"):
        profile(shared.manifest.graphs[SMALL], batches)


def test_the_profile_of_each_kind_of_graph(shared: Bundle) -> None:
    graphs = shared.manifest.graphs
    assert [str(b) for b in profile(graphs["unet"], (1, 8, 16))] == [
        "batch 1",
        "batch 2 to 8",
        "batch 9 to 16",
    ]
    assert [str(b) for b in profile(graphs["unet"], (1, 8), static=True)] == ["batch 1", "batch 8"]
    assert [str(b) for b in profile(graphs["detector"], (1, 8, 16))] == [
        "requests 1 to 16, probes 1",
        "requests 1 to 2, probes 2 to 8",
        "requests 1, probes 9 to 16",
    ]
    odd = TensorSpec("x", "float32", ("rows", 4))
    with pytest.raises(BundleError, match="no profile is declared for the axes"):
        profile(GraphEntry("x/model.onnx", (), (odd,), (odd,)), (1,))


def test_the_usual_batches_cover_what_a_detector_asks_for(shared: Bundle) -> None:
    """Every chunk of probes that the shipped policy can cut, for as many requests as fit into a run."""
    buckets = profile(shared.manifest.graphs["detector"], usual_batches(shared.manifest, "detector"))
    count = shared.manifest.probe.count
    for probes in range(1, count + 1):
        for requests in range(1, 64 // count + 1):
            assert any(bucket.covers({"requests": requests, "probes": probes}) for bucket in buckets)
    last = profile(shared.manifest.graphs["unet"], usual_batches(shared.manifest, "unet"))[-1]
    assert last.covers({"batch": 3 * 64})  # a full run of probes by the full model, with redirected guidance


def test_large_pictures_are_looked_at_one_by_one(shared: Bundle) -> None:
    large = replace(shared.manifest, picture=replace(shared.manifest.picture, latents=(4, 64, 64)))
    assert usual_batches(large, "detector") == (1,)
    assert usual_batches(large, "unet") == (1, shared.manifest.probe.count)


def test_the_command(bundle: Bundle) -> None:
    key = {"SAFELIGHT_ENGINE_KEY": str(bundle.engine_key)}
    call = [
        "build",
        str(bundle.folder),
        "--target",
        "sm_89",
        "--graph",
        SMALL,
        "--batch",
        "1",
        "--precision",
        "fp32",
    ]
    first = CliRunner().invoke(main, call, env=key)
    assert first.exit_code == 0 and "built" in first.stdout and SMALL in first.stdout
    assert "%" in first.stderr
    second = CliRunner().invoke(main, call, env=key)
    assert second.exit_code == 0 and "was there" in second.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "sm_90"], "target must be one of"),
        (["--target", "sm_89", "--graph", "nothing"], "has no graph nothing"),
        (["--target", "sm_89", "--batch", "1,x"], "--batch takes whole numbers"),
        (["--target", "sm_89", "--batch", "8,1"], "batches must ascend"),
        (["--precision", "int8"], "int8"),
        (["--backend", "onnxruntime"], "onnxruntime"),
    ],
)
def test_wrong_calls_of_the_command(original: Path, arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["build", str(original), *arguments])
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
