"""Kernels are compiled ahead of time without a GPU: complete, reproducible, and wide where it is promised."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from safelight.bench.kernel_facts import facts
from safelight.errors import SafelightError
from safelight.kernels.ahead.build import build
from safelight.kernels.ahead.manifest import (
    MANIFEST,
    Argument,
    CompiledKernel,
    KernelManifest,
    file_digests,
    installed_triton,
    lay_out,
    made_from,
    read_part,
)
from safelight.kernels.ahead.sass import read
from safelight.kernels.ahead.target import TARGETS, check_targets, runs_on

pytest.importorskip("triton", reason="compiling needs triton, which this machine has not")
ROOT = Path(__file__).resolve().parents[1]


def sources(folder: Path, monkeypatch: pytest.MonkeyPatch, *, before: str = "") -> None:
    """Put the test's kernels into `folder`, `before` ahead of them, and let the compiler find them."""
    folder.mkdir()
    text = (ROOT / "tests/two_kernels.py").read_text(encoding="utf-8")
    (folder / "two_kernels.py").write_text(before + text, encoding="utf-8")
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test's kernels, compiled for all targets."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        sources(folder / "sources", patch)
        build(folder / "built", source="two_kernels:kernels")
    return folder / "built"


def test_the_manifest_says_all_that_a_launch_needs(two: Path) -> None:
    manifest = KernelManifest.read(two)
    manifest.check_fresh()
    assert manifest.targets == TARGETS and manifest.triton == installed_triton()
    assert [kernel.name for kernel in manifest.kernels] == ["axpy", "product"]
    assert manifest.kernels[0].grid == "(ceil(n / BLOCK), 1, 1)"
    variant = manifest.variant("axpy_bf16")
    expected = [("x", "*bf16", 0, 8, True), ("y", "*bf16", 8, 8, True), ("out", "*bf16", 16, 8, True)]
    expected += [("n", "i64", 24, 8, True), ("scale", "fp32", 32, 4, False)]
    expected += [("global_scratch", "*i8", 40, 8, False), ("profile_scratch", "*i8", 48, 8, False)]
    assert variant.arguments == tuple(Argument(*row) for row in expected)
    assert variant.constants == {"BLOCK": 1024}
    named = {MANIFEST}
    for item in (item for kernel in manifest.kernels for item in kernel.variants):
        for target, binary in item.binaries.items():
            code = read_part(two, binary.cubin, binary.cubin_sha256)
            text = read_part(two, binary.ptx, binary.ptx_sha256).decode()
            assert code.startswith(b"\x7fELF") and f".entry {binary.entry}(" in text
            assert re.search(rf"^\.target {target}a?\b", text, re.MULTILINE)
            assert binary.threads == item.num_warps * 32 and f".reqntid {binary.threads}" in text.replace(
                ",", ""
            )
            assert binary.registers > 0
            named |= {binary.cubin, binary.ptx}
    files = {path.relative_to(two).as_posix() for path in two.rglob("*") if path.is_file()}
    assert files == named


def test_facts_tell_wide_access_shared_memory_and_no_spill(two: Path) -> None:
    rows = facts(two)
    assert [(row.variant, row.target) for row in rows] == [
        (name, target) for name in ("axpy_fp16", "axpy_bf16", "product_fp16") for target in TARGETS
    ]
    for row in rows:
        assert (row.spill_bytes, row.stack_bytes, row.local) == (0, 0, 0)
        if row.kernel == "axpy":
            assert (row.load_128, row.store_128, row.shared_bytes) == (2, 1, 0)
            assert (row.load_32, row.load_narrow, row.store_32, row.store_narrow) == (0, 0, 0, 0)
        else:
            assert row.shared_bytes > 48 << 10


def test_two_builds_from_two_folders_have_the_same_bytes(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # other path, other line numbers, another number of processes, and settings of a debugging session
    sources(tmp_path / "elsewhere", monkeypatch, before="\n\n\n")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    again = build(tmp_path / "again", targets=("sm_120", "sm_80"), jobs=1, source="two_kernels:kernels")
    first = KernelManifest.read(two)
    assert again.targets == ("sm_80", "sm_120") and not (tmp_path / "cache").exists()
    for kernel in again.kernels:
        for variant in kernel.variants:
            for target, binary in variant.binaries.items():
                assert binary == first.variant(variant.name).binaries[target]


def test_a_kernel_that_spills_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources(tmp_path / "sources", monkeypatch)
    build(tmp_path / "greedy", targets=("sm_90",), jobs=1, source="two_kernels:greedy_kernels")
    (row,) = facts(tmp_path / "greedy")
    assert row.spill_bytes > 0 and row.stack_bytes > 0 and row.local > 0 and row.registers == 255


@pytest.mark.parametrize(
    ("source", "message"),
    [("broken_kernels", "the signature has .'x', 'BLOCK'., the function"), ("none", "names no kernel")],
)
def test_what_does_not_compile_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    sources(tmp_path / "sources", monkeypatch, before="def none():\n    return ()\n")
    with pytest.raises(SafelightError, match=message):
        build(tmp_path / "out", targets=("sm_80",), jobs=2, source=f"two_kernels:{source}")
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_an_interpreted_kernel_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources(tmp_path / "sources", monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = [sys.executable, "-P", "-m", "safelight.kernels.ahead.worker", "two_kernels:kernels", "0", "1"]
    command += [str(tmp_path), str(tmp_path / "records"), "sm_80"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "axpy is InterpretedFunction and cannot be compiled: TRITON_INTERPRET was set" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--targets", "sm_90,sm_91"],
            "unknown target 'sm_91'; allowed are sm_80, sm_89, sm_90, sm_100, sm_120",
        ),
        (["--targets", ""], "unknown target ''; allowed are"),
        (["--jobs", "0"], "--jobs"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-P", "-m", "safelight", "kernels", "build", "--out", str(tmp_path / "x")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_the_command_lists_a_folder(two: Path) -> None:
    command = [sys.executable, "-P", "-m", "safelight", "kernels", "list", str(two)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 1 + 3 * len(TARGETS)
    assert lines[1].split()[:4] == ["axpy", "axpy_fp16", "sm_80", "128"]


def test_an_altered_file_and_a_stale_folder_are_named(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "copy"))
    binary = KernelManifest.read(folder).variant("axpy_fp16").binaries["sm_90"]
    whole = bytearray((folder / binary.cubin).read_bytes())
    whole[len(whole) // 2] ^= 1
    (folder / binary.cubin).write_bytes(whole)
    with pytest.raises(SafelightError, match="was altered: its SHA-256"):
        read_part(folder, binary.cubin, binary.cubin_sha256)
    with pytest.raises(SafelightError, match="missing; build again"):
        read_part(folder, "sm_90/none.cubin", binary.cubin_sha256)
    with pytest.raises(SafelightError, match="not a path inside"):
        read_part(folder, "../two", binary.cubin_sha256)
    manifest = KernelManifest.read(folder)
    for change, message in (
        ({"safelight": "0.0.9"}, "compiled by safelight 0.0.9, this is"),
        ({"triton": "3.5.1"}, "compiled by triton 3.5.1, installed is"),
    ):
        with pytest.raises(SafelightError, match=message):
            replace(manifest, **change).check_fresh()


def test_a_manifest_that_was_written_by_hand_is_refused(two: Path, tmp_path: Path) -> None:
    whole = json.loads((two / MANIFEST).read_text())

    def refused(message: str) -> None:
        (tmp_path / MANIFEST).write_text(json.dumps(whole))
        with pytest.raises(SafelightError, match=message):
            KernelManifest.read(tmp_path)

    with pytest.raises(SafelightError, match="holds no kernels.json; build again"):
        KernelManifest.read(tmp_path)
    sources, whole["kernels"][0]["sources"] = whole["kernels"][0]["sources"], {}
    refused("axpy names no file that it was made from")
    whole["kernels"][0]["sources"] = sources
    variant = whole["kernels"][0]["variants"][0]
    variant["arguments"][4]["offset_bytes"] = 36
    refused("do not lie as a C struct's members do")
    variant["arguments"][4]["offset_bytes"] = 32
    variant["arguments"].pop()
    refused("do not lie as a C struct's members do")
    del variant["binaries"]["sm_90"], whole["targets"][0]
    refused("manifest")
    whole["safelight_kernels"] = 1
    refused("format 1 is unknown")


def test_an_edit_refuses_the_kernels_that_are_made_from_the_file_and_no_other() -> None:
    from safelight.kernels.triton import kernels

    def files(function: Any) -> set[str]:
        """Where the function and all that it calls are written, by the names that its code looks up."""
        found = {Path(function.fn.__code__.co_filename).name}
        for name in function.fn.__code__.co_names:
            used = function.fn.__globals__.get(name)
            if hasattr(used, "fn") and used.fn.__module__.startswith("safelight."):
                found |= files(used)
        return found

    here = file_digests()
    refused: dict[str, list[str]] = {name: [] for name in here}
    for kernel in kernels():
        names = made_from(Path(str(import_module(kernel.function.fn.__module__).__file__)))
        assert {"tuning.py", "launch.py"} | files(kernel.function) <= set(names)
        record = CompiledKernel(kernel.name, kernel.grid, {name: here[name] for name in names}, ())
        record.check_fresh()
        for name in here:
            told = f"the kernel {kernel.name} was compiled from another {name} than is here; build again"
            if name not in names:
                record.check_fresh(sources=here | {name: "0" * 64})
                continue
            refused[name].append(kernel.name)
            for changed in (here | {name: "0" * 64}, {other: here[other] for other in here if other != name}):
                with pytest.raises(SafelightError, match=told):
                    record.check_fresh(sources=changed)
    assert refused["clip_input.py"] == ["resize_axis", "resize_runs"]
    assert refused["guidance_moments.py"] == ["guidance_moments", "guidance_step"]
    assert refused["normals.py"] == ["probe_rotate"]


def test_the_argument_block_is_a_c_struct() -> None:
    signature = {"a": "i8", "b": "fp64", "c": "i16", "d": "fp32", "SIZE": "constexpr", "e": "*i64"}
    block = lay_out(signature, ("e",))
    assert [(item.name, item.offset_bytes) for item in block] == [
        *(("a", 0), ("b", 8), ("c", 16), ("d", 20), ("e", 24)),
        *(("global_scratch", 32), ("profile_scratch", 40)),
    ]
    with pytest.raises(ValueError, match="an argument of type 'fp16' cannot be launched"):
        lay_out({"a": "fp16"}, ())


@pytest.mark.parametrize(
    ("capability", "best"),
    [
        *(((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 0), "sm_100")),
        *(((12, 0), "sm_120"), ((7, 5), None), ((10, 3), None), ((12, 1), None), ((11, 0), None)),
    ],
)
def test_code_of_one_architecture_runs_on_no_other(capability: tuple[int, int], best: str | None) -> None:
    assert runs_on(TARGETS, capability) == best
    assert runs_on(("sm_90",), (8, 0)) is None and runs_on(("sm_89",), (8, 0)) is None


def test_targets_are_ordered_and_none_is_an_error() -> None:
    assert check_targets((" sm_120", "sm_80", "sm_120")) == ("sm_80", "sm_120")
    with pytest.raises(ValueError, match="no target"):
        check_targets(())


def test_widths_are_read_from_a_listing() -> None:
    listing = """
        /*0190*/  @!P0 LDG.E.128 R8, desc[UR4][R12.64] ;  /* 0x000000040c088981 */
        /*01a0*/  LDG.E.ENL2.256 R4, R6, desc[UR4][R14.64] ;
        /*01b0*/  LDG.E.64.CONSTANT R4, [R14.64] ;
        /*01c0*/  LDG.E.U8 R4, [R14.64] ;
        /*01d0*/  LDG.E.LTC128B R4, [R14.64] ;
        /*01e0*/  LDGSTS.E.BYPASS.128 [R39], desc[UR20][R18.64], P5 ;
        /*01f0*/  LDGDEPBAR ;
        /*0200*/  STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0210*/  STG.E desc[UR4][R2.64], R4 ;
        /*0220*/  LDL.64 R4, [R1+0x8] ;
        /*0230*/  STL [R1], R4 ;
        /*0240*/  LDS.128 R4, [UR8] ;
    """
    access = read(listing)
    assert access.loads == {128: 2, 256: 1, 64: 1, 8: 1, 32: 1}
    assert access.stores == {16: 1, 32: 1} and access.local == 2
