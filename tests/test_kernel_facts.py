"""The project's compiled kernels spill no register and move 16 bytes at once where their promises allow it.

The committed table says so for every variant on every target; here some variants of each kernel are compiled
for one target and one of each for the others, and compared with the table's rows.
"""

import csv
import os
import re
from pathlib import Path

import pytest

from safelight.bench.kernel_facts import COMMAND, TABLE, Facts, facts
from safelight.kernels.ahead.build import build
from safelight.kernels.ahead.manifest import installed_triton
from safelight.kernels.ahead.target import TARGETS
from safelight.kernels.triton import kernels

pytest.importorskip("triton", reason="compiling needs triton, which this machine has not")
ROOT = Path(__file__).resolve().parents[1]
MAIN = "sm_90"  # the target that most variants are compiled for here

# kernel -> the ways in which its bulk is moved; a sum, a flag or a request's own numbers are not its bulk
WIDE = {
    "probe_rotate": ("load", "store"),
    "guidance_moments": ("load",),
    "guidance_step": ("load", "store"),
    "latent_to_x0": ("load", "store"),
    "concept_margins": ("load",),
    "resize_runs": ("load", "store"),
}
# variants that draw what they would load
DRAWN = "probe_latents"
# rows of 64 elements, two for each thread of the one warp that has them: as wide as that is
SHORT = re.compile(r"probe_rotate_\w+?_64(_circular)?")
NARROW = {
    "resize_axis": "the pixels under a filter begin anywhere, and so do rows that are not aligned",
    "margin_vote": "a probe has a handful of margins, and they lie apart in the block",
}
SOME = """
from dataclasses import replace
from safelight.kernels.triton import kernels
def some(places):
    found = []
    for kernel in kernels():
        chosen = sorted(set(places(len(kernel.variants))))
        found.append(replace(kernel, variants=tuple(kernel.variants[at] for at in chosen)))
    return tuple(found)
def few():
    return some(lambda count: (0, count // 2, count - 1))
def one():
    return some(lambda count: (count - 1,))
"""


def committed() -> list[dict[str, str]]:
    with (ROOT / TABLE).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Facts]:
    """The first, middle and last variant of each kernel on one target, and the last on the others."""
    made = tmp_path_factory.mktemp("kernels")
    (made / "some_kernels.py").write_text(SOME, encoding="utf-8")
    others = tuple(target for target in TARGETS if target != MAIN)
    with pytest.MonkeyPatch.context() as patch:
        path = [str(made), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        build(made / "few", targets=(MAIN,), source="some_kernels:few")
        build(made / "one", targets=others, source="some_kernels:one")
    return facts(made / "few") + facts(made / "one")


def test_no_kernel_spills(rows: list[Facts]) -> None:
    assert {row.target for row in rows} == set(TARGETS)
    assert [(row.variant, row.target, row.spill_bytes) for row in rows if row.spill_bytes or row.local] == []


def test_what_is_aligned_is_moved_16_bytes_at_once(rows: list[Facts]) -> None:
    assert {row.kernel for row in rows} == WIDE.keys() | NARROW.keys()
    lacking = [
        (row.variant, row.target, way)
        for row in rows
        for way in WIDE.get(row.kernel, ())
        if not (way == "load" and row.variant.startswith(DRAWN)) and not getattr(row, f"{way}_128")
        if not SHORT.fullmatch(row.variant)
    ]
    assert lacking == []
    assert all(row.aligned for row in rows if row.kernel in WIDE)


def test_the_committed_table_is_complete_and_clean() -> None:
    table = committed()
    variants = {(kernel.name, variant.name) for kernel in kernels() for variant in kernel.variants}
    wanted = sorted((*variant, target) for variant in variants for target in TARGETS)
    found = sorted((row["kernel"], row["variant"], row["target"]) for row in table)
    assert found == wanted, f"{TABLE} is of other kernels; do: {COMMAND}"
    assert [row["variant"] for row in table if row["spill_bytes"] != "0" or row["local"] != "0"] == []


def test_the_committed_table_is_what_the_kernels_give(rows: list[Facts]) -> None:
    table = {(row["variant"], row["target"]): row for row in committed()}
    if (theirs := next(iter(table.values()))["triton"]) != (here := installed_triton()):
        pytest.skip(f"the table was made by triton {theirs}, and {here} is installed here")
    for row in rows:
        ours = {name: str(getattr(row, name)) for name in Facts.__slots__}
        assert table[row.variant, row.target] == ours, f"{TABLE} is stale; do: {COMMAND}"
