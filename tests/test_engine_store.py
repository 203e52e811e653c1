"""The store of engines: nothing is loaded but what this user's own builder made, whole and for this
machine.
"""

import os
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from safelight.containment import list_files
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.engines.find import build_command, find_engine
from safelight.engine.engines.fingerprint import Parts, graph_digest
from safelight.engine.engines.flavour import Flavour
from safelight.engine.engines.key import make_key, read_key, usual_key
from safelight.engine.engines.lock import locked
from safelight.engine.engines.profile import Bucket, Lengths, bucket_of
from safelight.engine.engines.store import (
    PLAN,
    RECORD,
    SIGNATURE,
    Record,
    digest_of,
    read_plan,
    read_timings,
    seal_timings,
    write_entry,
)
from safelight.errors import BackendUnavailable, BundleError, ShapeError
from safelight.export.engines.profiles import profile

HANDMADE = runpy.run_path(str(Path(__file__).with_name("handmade.py")))
RTX = Flavour("tensorrt-rtx", "1.7.1", "tensorrt_rtx_bindings")
PROFILE = (Bucket({"batch": Lengths(1, 1, 1)}), Bucket({"batch": Lengths(2, 8, 8)}))


@pytest.fixture
def bundle(own_engines: Bundle) -> Bundle:
    return own_engines


def put(bundle: Bundle, plan: bytes = b"an engine", *, built_at: float = 1.0, **other: object) -> Path:
    """An entry whose parts are those of the text encoder here, but for `other`, signed as the builder
    does.
    """
    digest = graph_digest(bundle.manifest, "text_encoder")
    parts = Parts("text_encoder", digest, "fp16", PROFILE, RTX.name, RTX.version, "sm_89")
    parts = replace(parts, **other)
    folder = bundle.folder / "engines" / parts.fingerprint
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
    (folder / PLAN).write_bytes(plan)
    record = Record(parts, *digest_of(folder / PLAN), built_at=built_at, build_s=1.0, cpu_s=1.0, peak_bytes=1)
    write_entry(folder, record, make_key(bundle.engine_key))
    return folder


def find(bundle: Bundle, **other: object):
    return find_engine(bundle, "text_encoder", **({"flavours": (RTX,), "target": "sm_89"} | other))


def test_what_was_put_is_found_and_read(bundle: Bundle) -> None:
    folder = put(bundle)
    found = find(bundle)
    assert found.folder == folder and read_plan(found.folder, found.record) == b"an engine"
    open_bundle(bundle.folder)  # engines are no fault of a bundle


def test_the_engine_that_was_built_last_is_taken(bundle: Bundle) -> None:
    put(bundle, built_at=2.0)
    newest = put(bundle, built_at=3.0, precision="bf16")
    put(bundle, built_at=1.0, precision="fp32")
    assert find(bundle).folder == newest


def test_the_fingerprint_covers_every_part(bundle: Bundle) -> None:
    digest = graph_digest(bundle.manifest, "unet")
    parts = Parts("unet", digest, "fp16", PROFILE, "tensorrt-rtx", "1.7.1", "sm_89")
    others = {
        "graph": "detector",
        "graph_sha256": graph_digest(bundle.manifest, "detector"),
        "precision": "bf16",
        "profile": PROFILE[:1],
        "flavour": "tensorrt",
        "version": "1.7.2",
        "target": "sm_86",
        "plugins": ("rotation 1",),
        "safelight": "0.0.0",
    }
    assert set(others) == set(Parts.__dataclass_fields__)
    made = {parts.fingerprint} | {
        replace(parts, **{name: value}).fingerprint for name, value in others.items()
    }
    assert len(made) == 1 + len(others)


def test_the_graphs_digest_covers_its_weights(bundle: Bundle) -> None:
    entry = bundle.manifest.graphs["unet"]
    beside = replace(entry, external=("text_encoder/model.onnx",))
    other = replace(bundle.manifest, graphs=bundle.manifest.graphs | {"unet": beside})
    assert graph_digest(other, "unet") != graph_digest(bundle.manifest, "unet")


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"graph_sha256": "0" * 64}, "graph or weights"),
        ({"flavour": "tensorrt"}, "flavour of TensorRT (tensorrt, here tensorrt-rtx)"),
        ({"version": "1.6.0"}, "version of TensorRT (1.6.0, here 1.7.1)"),
        ({"target": "sm_120"}, "GPU architecture (sm_120, here sm_89)"),
        ({"safelight": "0.0.1"}, "version of safelight (0.0.1, here"),
        ({"plugins": ("rotation 1",)}, "plugins (rotation 1, here none)"),
    ],
)
def test_a_stale_engine_says_which_part_differs_and_what_rebuilds_it(
    bundle: Bundle, other: dict, word: str
) -> None:
    put(bundle, **other)
    with pytest.raises(BackendUnavailable) as caught:
        find(bundle)
    said = str(caught.value)
    assert word in said and said.count("differs in") == 1 and "\n" not in said
    assert f"safelight build {bundle.folder} --backend tensorrt --target sm_89 --graph text_encoder" in said


def test_the_nearest_stale_engine_is_the_one_that_is_named(bundle: Bundle) -> None:
    put(bundle, version="1.6.0", target="sm_75")
    put(bundle, version="1.6.0")
    with pytest.raises(BackendUnavailable, match=r"differs in version of TensorRT \(1.6.0, here 1.7.1\); do"):
        find(bundle)


def test_an_engine_of_either_installed_flavour_will_do(bundle: Bundle) -> None:
    put(bundle, flavour="tensorrt", version="11.4")
    full = Flavour("tensorrt", "11.4", "tensorrt")
    assert find(bundle, flavours=(RTX, full)).flavour == full


@pytest.mark.parametrize("graph", ["unet", "detector"])
def test_an_engine_of_another_graph_is_no_engine(bundle: Bundle, graph: str) -> None:
    put(bundle)
    with pytest.raises(BackendUnavailable, match=f"no engine of {graph} was built.*safelight build"):
        find_engine(bundle, graph, flavours=(RTX,), target="sm_89")


def test_no_engine_at_all(bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match="no engine of text_encoder was built.*do: safelight build"):
        find(bundle)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def link(path: Path) -> None:
    target = path.parent.parent.parent / path.name
    path.rename(target)
    path.symlink_to(target)


def hard_link(path: Path) -> None:
    os.link(path, path.parent.parent.parent / path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


FAULTS = {
    "altered": flip,
    "truncated": truncate,
    "grown": grow,
    "missing": Path.unlink,
    "link": link,
    "hard link": hard_link,
    "pipe": pipe,
    "readable by others": lambda path: path.chmod(0o640),
}


@pytest.mark.parametrize("name", [PLAN, RECORD, SIGNATURE])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_was_tampered_with_is_never_loaded(bundle: Bundle, fault: str, name: str) -> None:
    folder = put(bundle)
    FAULTS[fault](folder / name)
    with pytest.raises(BundleError) as caught:
        found = find(bundle)
        read_plan(found.folder, found.record)
    assert "build" in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_others_may_write_are_not_trusted(bundle: Bundle) -> None:
    folder = put(bundle)
    for open_folder in (folder, folder.parent):
        open_folder.chmod(0o770)
        with pytest.raises(BundleError, match="open to others"):
            find(bundle)
        open_folder.chmod(0o700)
    find(bundle)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["", PLAN, RECORD])
def test_files_of_another_user_are_not_trusted(bundle: Bundle, name: str) -> None:
    folder = put(bundle)
    os.chown(folder / name, 65534, -1)
    with pytest.raises(BundleError, match="belongs to user 65534"):
        found = find(bundle)
        read_plan(found.folder, found.record)


def test_an_engine_of_another_key_is_foreign(bundle: Bundle, tmp_path: Path) -> None:
    put(bundle)
    make_key(tmp_path / "other.key")
    with pytest.raises(BundleError, match="signature is not this user's"):
        find(replace(bundle, engine_key=tmp_path / "other.key"))
    with pytest.raises(BundleError, match=r"none\.key is missing: .*; do: safelight build .*none\.key$"):
        find(replace(bundle, engine_key=tmp_path / "none.key"))
    assert not (tmp_path / "none.key").exists()  # whoever reads makes no key


def test_one_foreign_engine_does_not_hide_ones_own(bundle: Bundle) -> None:
    foreign, own = put(bundle, precision="bf16"), put(bundle)
    flip(foreign / SIGNATURE)
    assert find(bundle).folder == own


def test_a_signed_record_under_another_name_is_not_trusted(bundle: Bundle) -> None:
    folder = put(bundle)
    folder.rename(folder.parent / ("0" * 64))
    with pytest.raises(BundleError, match="was renamed"):
        find(bundle)


def test_a_plan_under_another_signed_record_is_not_trusted(bundle: Bundle) -> None:
    one, other = put(bundle, b"one"), put(bundle, b"two", precision="bf16", built_at=9.0)
    shutil.copyfile(one / PLAN, other / PLAN)
    found = find(bundle)
    with pytest.raises(BundleError, match="was altered"):
        read_plan(found.folder, found.record)


def test_the_key_is_made_once_private_and_random(tmp_path: Path) -> None:
    path = tmp_path / "state" / "engine.key"
    found: list[bytes] = []
    makers = [threading.Thread(target=lambda: found.append(make_key(path))) for _ in range(8)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert len(found) == 8 and len(set(found)) == 1 and len(found[0]) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == [path.name]
    assert make_key(tmp_path / "another.key") != found[0]
    assert usual_key().is_relative_to(Path.home())


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_what_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "engine.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(BundleError, match="so it is no key; delete it and build"):
        read_key(path)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    make_key(tmp_path / "engine.key")
    (tmp_path / "engine.key").chmod(0o644)
    with pytest.raises(BundleError, match=r"can be read by others \(mode 644"):
        read_key(tmp_path / "engine.key")


@pytest.mark.parametrize(
    "name",
    [
        "engines/note.md",
        "engines/engine.plan",
        f"engines/{'0' * 63}/engine.plan",
        f"engines/{'g' * 64}/engine.plan",
        f"engines/{'0' * 64}/engine.pkl",
        f"engines/{'0' * 64}/model.onnx",
        f"engines/{'0' * 64}/deeper/engine.plan",
        f"engines/{'0' * 64}.partial/other.bin",
        f"engines/{'0' * 64}.partial/source/unet/other.bin",
        f"engines/{'0' * 64}/source/unet/model.onnx",
        "engines/timing/evil.so",
        "Engines/0.lock",
        "elsewhere/engine.plan",
    ],
)
def test_a_bundle_tolerates_nothing_else_in_the_store(bundle: Bundle, name: str) -> None:
    put(bundle)
    (bundle.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle.folder / name).write_bytes(b"x")
    with pytest.raises(BundleError):
        open_bundle(bundle.folder)


def test_a_bundle_opens_while_an_engine_is_built(bundle: Bundle) -> None:
    put(bundle)
    for name in (
        f"engines/{'0' * 64}.lock",
        f"engines/{'0' * 64}.partial/model.onnx",
        f"engines/{'0' * 64}.partial/model.onnx_data",
        f"engines/{'0' * 64}.partial/engine.plan",
        f"engines/{'0' * 64}.partial/timing.cache",
        f"engines/{'0' * 64}.partial/source/unet/model.onnx",
        f"engines/{'0' * 64}.partial/source/unet/model.onnx_data",
        "engines/timing/tensorrt-rtx-1.7.1.116-sm_89.cache",
    ):
        (bundle.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle.folder / name).write_bytes(b"x")
    open_bundle(bundle.folder)


def test_a_bundle_opens_while_an_engine_gets_its_name(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder's folder is gone between its parent's listing and its own."""
    partial = bundle.folder / "engines" / f"{'0' * 64}.partial"
    partial.mkdir(parents=True)
    real = os.scandir

    def scandir(path):
        if Path(path) == partial:
            partial.rmdir()
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    open_bundle(bundle.folder)
    assert not partial.exists()
    with pytest.raises(BundleError, match="cannot be listed"):
        list(list_files(bundle.folder / "nothing"))


def test_a_manifest_may_list_no_engine(bundle: Bundle) -> None:
    folder = put(bundle)
    name = (folder / RECORD).relative_to(bundle.folder).as_posix()
    entry = bundle.manifest.files["tokenizer/vocab.json"]
    replace(bundle.manifest, files=bundle.manifest.files | {name: entry}).write(bundle.folder)
    with pytest.raises(BundleError, match="is no file of an engine"):
        open_bundle(bundle.folder)


def test_buckets() -> None:
    assert bucket_of(PROFILE, {"batch": 1}, remedy="x") == 0
    assert [bucket_of(PROFILE, {"batch": batch}, remedy="x") for batch in (2, 8)] == [1, 1]
    for axes in ({"batch": 9}, {"batch": 0}, {}, {"batch": 1, "probes": 1}):
        with pytest.raises(ShapeError, match=r"\(batch 1; batch 2 to 8\); rebuild: a command"):
            bucket_of(PROFILE, axes, remedy="a command")


def test_what_is_outside_is_covered_by_the_batches_that_the_remedy_names() -> None:
    """16 probes of 4 requests at once, where there is a bucket for 9 to 64 probes of one request."""
    entry = open_bundle("shapes").manifest.graphs["detector"]
    asked = {"requests": 4, "probes": 16}
    with pytest.raises(ShapeError, match=r"rebuild: a command --batch [0-9,]+$") as caught:
        bucket_of(profile(entry, (1, 8, 64)), asked, remedy="a command")
    batches = tuple(int(part) for part in str(caught.value).rpartition(" ")[2].split(","))
    assert batches == (1, 8, 16, 64)
    assert bucket_of(profile(entry, batches), asked, remedy="x") == 2


def test_the_command_that_builds_is_one_that_a_shell_takes(bundle: Bundle) -> None:
    odd = replace(bundle, folder=Path("/my bundles/a;b"), engine_key=Path("/my keys/k"))
    words = shlex.split(build_command(odd, "unet", "sm_89"))
    assert words[:3] == ["safelight", "build", "/my bundles/a;b"]
    assert words[-2:] == ["--engine-key", "/my keys/k"]
    assert build_command(open_bundle("shapes"), "unet", "sm_89").startswith("safelight build shapes ")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("graph", ["unet", "detector"])
@pytest.mark.parametrize("batches", [(1,), (1, 2), (1, 8, 16)])
def test_the_command_builds_what_it_replaces(graph: str, batches: tuple[int, ...], static: bool) -> None:
    """Its own options, read again by the command line, give the profile of the engine that is stale."""
    shapes = open_bundle("shapes")
    entry = shapes.manifest.graphs[graph]
    buckets = profile(entry, batches, static=static)
    parts = Parts(graph, "0" * 64, "bf16", buckets, "tensorrt", "10.1", "sm_89")
    words = shlex.split(build_command(shapes, graph, "sm_89", like=parts))
    options = dict(zip(words, [*words[1:], ""], strict=True))
    assert (options["--precision"], options["--flavour"]) == ("bf16", "tensorrt")
    asked = tuple(int(part) for part in options["--batch"].split(","))
    assert profile(entry, asked, static="--static" in words) == buckets
    assert "--batch" not in build_command(shapes, graph, "sm_89", like=parts, batches=False)


def test_timings_are_read_where_this_user_sealed_them(tmp_path: Path) -> None:
    path, key = tmp_path / "timing.cache", b"k" * 32
    assert read_timings(path, key) == b""
    path.write_bytes(b"timings")
    seal_timings(path, key)
    assert path.stat().st_mode & 0o077 == 0 and read_timings(path, key) == b"timings"
    assert read_timings(path, b"x" * 32) == b""  # of another user
    flip(path)
    assert read_timings(path, key) == b""
    path.write_bytes(b"from a bundle that was unpacked")
    assert read_timings(path, key) == b""
    path.chmod(0o644)
    with pytest.raises(BundleError, match="open to others"):
        read_timings(path, key)


def test_lengths_out_of_order_are_refused() -> None:
    for wrong in ((0, 1, 1), (2, 1, 3), (1, 3, 2)):
        with pytest.raises(ValueError, match="1 <= least <= best <= most"):
            Lengths(*wrong)


HOLD = """
import sys, time, pathlib
from safelight.engine.engines.lock import locked
with locked(pathlib.Path(sys.argv[1]), waiting=lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_and_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "engines" / "0.lock"
    holder = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        told, entered = [], []

        def wait() -> None:
            with locked(path, waiting=lambda: told.append(True)):
                entered.append(time.monotonic())

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.3)
        assert told == [True] and not entered
        holder.kill()
        waiter.join(30)
        assert entered
    finally:
        holder.kill()
        holder.wait()
    assert os.listdir(path.parent) == []


def test_many_waiters_come_in_one_by_one(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "engines" / "0.lock", [0], [0]

    def enter() -> None:
        for _ in range(20):
            with locked(path, waiting=lambda: None):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                inside[0] -= 1

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and os.listdir(path.parent) == []
