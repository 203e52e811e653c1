"""The table of kernel settings, and the tool that measures what to put there. Needs no GPU."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pytest
import torch

from safelight.bench import tune_kernels
from safelight.errors import BackendUnavailable
from safelight.kernels import dispatch
from safelight.kernels.triton import tuning
from safelight.kernels.triton.kernel import Kernel
from safelight.kernels.triton.tuning import DEFAULT, TABLE, Setting, setting, use_setting

WITH_TRITON = pytest.mark.skipif(
    not dispatch._installed(), reason="the kernels need Triton, which is not installed"
)


def test_a_row_takes_the_first_block_that_holds_it_and_else_the_largest() -> None:
    sizes = sorted(TABLE[DEFAULT]["probe_rotate"])
    for size in (1, *sizes):
        fits = min(block for block in sizes if block >= size)
        assert setting("probe_rotate", size=size).block == fits
    assert setting("probe_rotate", size=10 * sizes[-1]).block == sizes[-1]


def test_a_gpu_s_own_entry_comes_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Setting(512, 2)
    monkeypatch.setattr(tuning, "TABLE", {**TABLE, "Lamp 3000": {"guidance_step": {512: own}}})
    assert setting("guidance_step", "Lamp 3000", size=16384) is own
    assert setting("latent_to_x0", "Lamp 3000") == setting("latent_to_x0")
    assert setting("guidance_step", "another") == setting("guidance_step")


def test_a_setting_that_is_tried_holds_for_its_kernel_and_its_block() -> None:
    tried = Setting(64, 1)
    with use_setting("guidance_step", tried):
        assert setting("guidance_step") is tried and setting("latent_to_x0") != tried
    assert setting("guidance_step") != tried


@WITH_TRITON
def test_every_case_launches_the_kernel_that_it_tunes_by_the_setting_that_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safelight.kernels.triton import kernels

    launched: list[tuple[str, int, int]] = []

    def record(kernel: Kernel, grid: object, arguments: object, constants: Mapping[str, Any]) -> None:
        launched.append((kernel.name, constants.get("BLOCK", 0), constants["num_warps"]))

    names = (
        "clip_input",
        "concept_vote",
        "guidance_moments",
        "guidance_step",
        "latent_to_x0",
        "probe_rotate",
    )
    for name in names:
        monkeypatch.setattr(import_module(f"safelight.kernels.triton.{name}"), "launch", record)
    covered = set()
    for name, size, settings, call in tune_kernels.cases("cpu", torch.bfloat16):
        assert len(set(settings)) == len(settings) > 1 and size >= 0
        for tried in settings:
            launched.clear()
            with use_setting(name, tried):
                call()
            assert (name, tried.block, tried.num_warps) in launched
        covered.add(name)
    assert covered == {kernel.name for kernel in kernels()}


def test_the_fastest_is_kept_and_printed_as_the_table_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [Setting(256, 1), Setting(512, 2), Setting(1024, 4)]
    times = {256: 3.0, 512: 1.0, 1024: 1.0}

    def measure(call: tune_kernels.Call) -> float:
        return times[call()]

    best = tune_kernels.fastest("guidance_step", tried, lambda: setting("guidance_step").block, measure)
    assert best == Setting(512, 2)
    lines = tune_kernels.entry("Lamp 3000", {"guidance_step": {512: best}})
    written = eval(f"{{{lines}}}", {"Setting": Setting})
    assert written == {"Lamp 3000": {"guidance_step": {512: best}}}


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="tuning measures kernels on an NVIDIA GPU"):
        tune_kernels.main()
