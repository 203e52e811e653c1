"""Two small kernels for the tests of ahead-of-time compilation, and one that has too few registers.

Copied to a folder of its own by the tests, and imported by the compiler's processes.
"""

import triton
import triton.language as tl

from safelight.kernels.triton.kernel import Kernel, Variant


@triton.jit
def axpy(x, y, out, n, scale, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, inside).to(tl.float32) * scale + tl.load(y + at, inside).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def product(a, b, out, size, rows, DEPTH: tl.constexpr):  # noqa: N803
    """A 128 x 128 tile of a @ b, through more than 48 KiB of shared memory."""
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    deep = tl.arange(0, DEPTH)
    total = tl.zeros((128, 128), tl.float32)
    for start in range(0, size, DEPTH):
        left = tl.load(a + row[:, None] * size + (start + deep)[None, :], row[:, None] < rows)
        right = tl.load(b + (start + deep)[:, None] * size + column[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + row[:, None] * size + column[None, :], total.to(tl.float16), row[:, None] < rows)


@triton.jit
def greedy(x, out, BLOCK: tl.constexpr):  # noqa: N803
    """Keeps 256 values a thread alive, more than there are registers."""
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(out + at, tl.cumsum(value, 0) + value)


def _axpy(element: str) -> Variant:
    pointers = dict.fromkeys(("x", "y", "out"), f"*{element}")
    signature = pointers | {"n": "i64", "scale": "fp32", "BLOCK": "constexpr"}
    return Variant(f"axpy_{element}", signature, {"BLOCK": 1024}, ("x", "y", "out", "n"), 4, 1)


def kernels() -> tuple[Kernel, ...]:
    pointers = dict.fromkeys(("a", "b", "out"), "*fp16")
    signature = pointers | {"size": "i32", "rows": "i32", "DEPTH": "constexpr"}
    tile = Variant("product_fp16", signature, {"DEPTH": 64}, ("a", "b", "out", "size"), 8, 3)
    return (
        Kernel("axpy", axpy, (_axpy("fp16"), _axpy("bf16")), "(ceil(n / BLOCK), 1, 1)"),
        Kernel("product", product, (tile,), "(ceil(rows / 128), size / 128, 1)"),
    )


def greedy_kernels() -> tuple[Kernel, ...]:
    signature = {"x": "*fp32", "out": "*fp32", "BLOCK": "constexpr"}
    variant = Variant("greedy", signature, {"BLOCK": 8192}, ("x", "out"), 1, 1)
    return (Kernel("greedy", greedy, (variant,), "(1, 1, 1)"),)


def broken_kernels() -> tuple[Kernel, ...]:
    signature = {"x": "*fp32", "BLOCK": "constexpr"}
    return (Kernel("greedy", greedy, (Variant("broken", signature, {"BLOCK": 64}, (), 1, 1),), "(1, 1, 1)"),)
