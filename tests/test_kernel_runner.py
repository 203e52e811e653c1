"""What serving launches was built ahead of time: each operation finds its variants at serving sizes, and the
grids are what the manifest's rules give.

Needs no GPU: the runner of the test writes down what it would start.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which this machine has not")

from safelight.bench.kernel_case import SERVING  # noqa: E402
from safelight.bench.kernel_cases import BUILDERS  # noqa: E402
from safelight.errors import BackendUnavailable  # noqa: E402
from safelight.kernels.triton import kernels  # noqa: E402
from safelight.kernels.triton.kernel import Kernel, Variant  # noqa: E402
from safelight.kernels.triton.launch import use_runner  # noqa: E402


class Recorder:
    """A runner that starts nothing."""

    def __init__(self) -> None:
        self.started: list[tuple[Kernel, Variant, tuple[int, int, int], Mapping[str, Any]]] = []

    def __call__(
        self, kernel: Kernel, variant: Variant, grid: tuple[int, int, int], arguments: Mapping[str, Any]
    ) -> None:
        self.started.append((kernel, variant, grid, arguments))


def by_rule(kernel: Kernel, sizes: Mapping[str, Any]) -> tuple[int, int, int]:
    """The kernel's grid rule, worked out over these sizes."""
    assert re.fullmatch(r"[\w\s(),+*/-]+", kernel.grid), kernel.grid
    return eval(kernel.grid, {"__builtins__": {}, "ceil": math.ceil, "max": max}, dict(sizes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", BUILDERS)
def test_serving_finds_its_variants_and_their_grids(name: str, dtype: torch.dtype) -> None:
    case = BUILDERS[name][0](SERVING, dtype, "cpu")
    recorder = Recorder()
    with use_runner(recorder):
        case.fast()
    assert recorder.started
    known = {kernel.name: kernel for kernel in kernels()}
    for kernel, variant, grid, arguments in recorder.started:
        assert known[kernel.name].variant(variant.name) is variant
        passed = [key for key, kind in variant.signature.items() if kind != "constexpr"]
        assert set(passed) == set(arguments)
        numbers = {key: value for key, value in arguments.items() if not isinstance(value, torch.Tensor)}
        sizes = {"requests": SERVING.requests, "probes": SERVING.probes}
        assert by_rule(kernel, sizes | numbers | dict(variant.constants)) == grid


def test_what_was_not_built_is_not_compiled() -> None:
    case = BUILDERS["guidance_step, 2 branches"][0](SERVING, torch.float64, "cpu")
    with use_runner(Recorder()), pytest.raises((BackendUnavailable, ValueError)):
        case.fast()


def test_no_two_kernels_share_a_variant_name() -> None:
    names = [variant.name for kernel in kernels() for variant in kernel.variants]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
