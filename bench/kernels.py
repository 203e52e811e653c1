"""Time of the fused kernels against plain torch and torch.compile, on a GPU: `safelight.bench.kernels`.

All three run in a CUDA graph and one by one, in the same process, and are compared with the reference before
they are timed. `--rehearse` runs every kernel once at tiny sizes and compares it, on a GPU or on Triton's
interpreter; it writes nothing.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

COMMAND = "python -P -m safelight.bench.kernels"
RESULTS = Path("bench/results")
REHEARSED = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}  # largest error that a rehearsal lets pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or rehearse; 1 where that found a fault, 2 where it cannot run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, compared and not timed")
    parser.add_argument("--dtype", choices=tuple(REHEARSED), default="float16")
    parser.add_argument("--only", help="operations whose name begins so")
    parser.add_argument("--out", type=Path, default=RESULTS)
    call = parser.parse_args(arguments)
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        if not call.rehearse:
            print("safelight: no NVIDIA GPU here; do: --rehearse, which writes no figures", file=sys.stderr)
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    torch.manual_seed(20_250_109)
    if call.rehearse:
        return rehearse("cuda" if on_gpu else "cpu", call.dtype, call.only)
    return measure(call.out, getattr(torch, call.dtype), call.only)


def rehearse(device: str, dtype: str, only: str | None) -> int:
    """Every case once at tiny sizes; returns 1 where one differs from the reference too much."""
    import torch

    from safelight.bench.kernel_case import TINY
    from safelight.bench.kernel_cases import BUILDERS

    wrong = 0
    for name, (build, _) in BUILDERS.items():
        if only and not name.startswith(only):
            continue
        case = build(TINY, getattr(torch, dtype), device)
        case.fast()
        ours, plain = case.error(), case.plain_error(case.plain())
        wrong += max(ours, plain) > REHEARSED[dtype] + case.slack
        print(f"{case.operation:26}{case.shape:20}kernel {ours:.2e}   plain torch {plain:.2e}", flush=True)
    print("rehearsal on", torch.cuda.get_device_name() if device == "cuda" else "the interpreter: no figures")
    return 1 if wrong else 0


def measure(out: Path, dtype: Any, only: str | None) -> int:
    """Rows of every case at serving size and at one that fills the memory bus, written as they come.

    Returns 1 where a case could not be measured, which is said; the others' rows are written all the same.
    """
    from safelight.bench.gpu_rows import Gpu, KernelRow, write
    from safelight.bench.gpu_timing import copy_bytes_per_second
    from safelight.bench.kernel_case import SERVING
    from safelight.bench.kernel_cases import BUILDERS

    copy = copy_bytes_per_second()
    gpu = Gpu.here()  # it has just worked
    path = out / f"{gpu.slug}-kernels.csv"
    print(f"{gpu.gpu}, copy: {copy / 1e9:.0f} GB/s read and written", flush=True)
    rows: list[KernelRow] = []
    failed = 0
    for name, (build, many) in BUILDERS.items():
        if only and not name.startswith(only):
            continue
        for sizes in (SERVING, replace(SERVING, requests=many)):
            try:
                case = build(sizes, dtype, "cuda")
                made = _rows(case, str(dtype).removeprefix("torch."), None if sizes is SERVING else copy)
            except (RuntimeError, ValueError) as fault:
                print(
                    f"{name}, {sizes.requests} requests: not measured: {fault}", file=sys.stderr, flush=True
                )
                failed += 1
                continue
            rows += made
            print(*map(_line, made), sep="\n", flush=True)
            write(path, gpu, rows)
    print(f"safelight: {len(rows)} rows in {path}; {failed} cases not measured", file=sys.stderr)
    return 1 if failed or not rows else 0


def _line(row: Any) -> str:
    share = "" if row.pct_of_copy is None else f"{row.pct_of_copy:5.0f} % of a copy"
    return (
        f"{row.operation:26}{row.shape:22}{row.provider:15}{row.form:12}{row.p50_us:10.2f} us"
        f"{row.launches:4} launches   error {row.refcheck_error:.1e}{share}"
    )


def _rows(case: Any, dtype: str, copy: float | None) -> list[Any]:
    """Ours, plain torch and torch.compile; in a graph, and one by one. Nothing is timed that does not run."""
    import torch

    from safelight.bench.gpu_rows import KernelRow
    from safelight.bench.gpu_timing import in_graph, launches, one_by_one
    from safelight.bench.kernel_case import REFCHECK
    from safelight.bench.rows import percentiles

    torch.compiler.reset()
    compiled = torch.compile(case.plain, dynamic=False)
    calls: dict[str, Callable[[], Any]] = {
        "triton": case.fast,
        "torch": case.plain,
        "torch.compile": compiled,
    }
    case.fast()
    errors = {"triton": case.error()}
    errors |= {name: case.plain_error(calls[name]()) for name in ("torch", "torch.compile")}
    counted = {provider: launches(call) for provider, call in calls.items()}
    forms = {"in a graph": in_graph, "one by one": one_by_one}
    times = {
        (provider, form): percentiles(timer(call))  # of microseconds, in spite of the keys' names
        for provider, call in calls.items()
        for form, timer in forms.items()
    }
    middle = {which: found["p50_ms"] for which, found in times.items()}
    return [
        KernelRow(
            operation=case.operation,
            provider=provider,
            form=form,
            dtype=dtype,
            shape=case.shape,
            p50_us=found["p50_ms"],
            p90_us=found["p90_ms"],
            p99_us=found["p99_ms"],
            launches=counted[provider],
            bytes=case.moved,
            pct_of_copy=None if copy is None else 100 * case.moved / (found["p50_ms"] * 1e-6) / copy,
            x_eager=middle["torch", form] / found["p50_ms"],
            x_compile=middle["torch.compile", form] / found["p50_ms"],
            refcheck=REFCHECK if provider == "triton" else case.plain_refcheck,
            refcheck_error=errors[provider],
            command=COMMAND,
        )
        for (provider, form), found in times.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
