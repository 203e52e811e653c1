"""On a GPU: kernels compiled ahead of time give the reference's results, in graphs too; nothing compiles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which this machine has not")

from safelight.kernels.ahead.build import build  # noqa: E402
from safelight.kernels.ahead.launcher import KernelLibrary  # noqa: E402
from safelight.kernels.ahead.target import TARGETS, runs_on  # noqa: E402

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]
# error as a share of the largest value: half a step of the dtype that is written, and float32's own
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def target() -> str:
    here = runs_on(TARGETS, torch.cuda.get_device_capability())
    if here is None:
        pytest.skip(f"kernels are compiled for {TARGETS}, none of which runs on this GPU")
    return here


@pytest.fixture(scope="module")
def two(two_kernels: Callable[..., Path]) -> Path:
    """The test's own kernels for this GPU."""
    return two_kernels(target())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's kernels for this GPU."""
    folder = tmp_path_factory.mktemp("kernels") / "built"
    build(folder, targets=(target(),))
    return folder


@pytest.mark.parametrize("size", [16, 1024, 1040, 100_000])
def test_a_launch_computes_on_the_current_stream(two: Path, size: int) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    x, y = (torch.randn(size, generator=generator, device="cuda").half() for _ in range(2))
    out = torch.empty_like(x)
    with KernelLibrary.open(two) as library, torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        library.function("axpy_fp16").launch((-(-size // 1024), 1, 1), x, y, out, size, 0.5)
        torch.cuda.current_stream().synchronize()
        torch.testing.assert_close(out, (x.float() * 0.5 + y.float()).half(), rtol=1e-3, atol=1e-3)


def test_a_graph_captures_a_launch_with_much_shared_memory(two: Path) -> None:
    generator = torch.Generator("cuda").manual_seed(4)
    a, b = (torch.randn(256, 256, generator=generator, device="cuda").half() / 16 for _ in range(2))
    out = torch.zeros_like(a)
    with KernelLibrary.open(two) as library:
        product = library.function("product_fp16")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            product.launch((2, 2, 1), a, b, out, 256, 256)
        assert not out.any()
        graph.replay()
        torch.testing.assert_close(out, (a.float() @ b.float()).half(), rtol=1e-3, atol=1e-3)


def test_tensors_elsewhere_are_refused(two: Path) -> None:
    x = torch.zeros(16, dtype=torch.half)
    with (
        KernelLibrary.open(two) as library,
        pytest.raises(ValueError, match="x: the tensor is on cpu; move it"),
    ):
        library.function("axpy_fp16").launch((1, 1, 1), x, x, x, 16, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_serving_from_cubins_equals_the_reference_and_compiles_nothing(
    built: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    from safelight.bench.kernel_case import SERVING
    from safelight.bench.kernel_cases import BUILDERS
    from safelight.kernels.triton.launch import use_runner

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", refuse)
    torch.manual_seed(5)
    with KernelLibrary.open(built) as library, use_runner(library.run):
        for name, (make, _) in BUILDERS.items():
            case = make(SERVING, dtype, "cuda")
            case.fast()
            assert case.error() <= BOUND[dtype] + case.slack, name
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                case.fast()
            graph.replay()
            assert case.error() <= BOUND[dtype] + case.slack, f"{name}, replayed"
