"""Compile a share of the kernels, in a process of its own: `python -m safelight.kernels.ahead.worker`.

Triton takes its settings from the environment once, when it is imported; the process that starts this one
(`build`) gives it a clean environment. Knows Triton's compiler, its log of the assembler, and no GPU.
"""

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.kernels.ahead.manifest import installed_triton, lay_out, made_from
from safelight.kernels.ahead.target import number
from safelight.kernels.triton.kernel import Kernel, Variant
from safelight.plain import to_plain

_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_ENTRY = re.compile(r"\.entry\s+\w+\(([^)]*)\)", re.DOTALL)
_ALIGNED = [["tt.divisibility", 16]]
_SCRATCH = ("global_scratch_size", "profile_scratch_size")


def load_kernels(source: str) -> tuple[Kernel, ...]:
    """Call `module:function`, which returns the kernels. Raises SafelightError where they are interpreted."""
    from triton.runtime.jit import JITFunction

    module, _, function = source.partition(":")
    found: tuple[Kernel, ...] = getattr(import_module(module), function)()
    for kernel in found:
        if not isinstance(kernel.function, JITFunction):
            raise SafelightError(
                f"{kernel.name} is {type(kernel.function).__name__} and cannot be compiled: TRITON_INTERPRET "
                "was set when it was imported; unset it"
            )
    return found


def tasks(kernels: Sequence[Kernel], targets: Sequence[str]) -> Iterator[tuple[Kernel, Variant, str]]:
    """Everything there is to compile, always in the same order."""
    for kernel in kernels:
        for variant in kernel.variants:
            for target in targets:
                yield kernel, variant, target


def compile_variant(kernel: Kernel, variant: Variant, target: str) -> tuple[Any, str]:
    """What `triton.compile` returns, and the assembler's log. Raises SafelightError."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.signature)
    function: Any = kernel.function
    if names != list(function.arg_names):
        raise SafelightError(
            f"{variant.name}: the signature has {names}, the function {function.arg_names}; write them alike"
        )
    source = ASTSource(
        fn=function,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): _ALIGNED for name in variant.aligned},
    )
    # fusion is the default of all releases up to 3.9; said here since later ones change it
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": True,
    }
    knobs.nvidia.dump_ptxas_log = True  # printed, and so caught
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            made = triton.compile(source, target=GPUTarget("cuda", number(target), 32), options=options)
    except Exception as fault:
        raise SafelightError(f"{variant.name} does not compile for {target}: {fault}") from fault
    return made, log.getvalue()


def compile_task(kernel: Kernel, variant: Variant, target: str, folder: Path) -> dict[str, Any]:
    """Compile, write `<target>/<variant>.cubin` and `.ptx`, and return the variant's part of the manifest."""
    made, log = compile_variant(kernel, variant, target)
    arguments = lay_out(variant.signature, variant.aligned)
    _check_entry(variant.name, made, len(arguments))
    frames, registers = _FRAME.findall(log), _REGISTERS.findall(log)
    if not frames or not registers:
        raise SafelightError(f"{variant.name}, {target}: the assembler did not say what it used: {log!r}")
    record: dict[str, Any] = {"entry": made.metadata.name, "threads": 32 * made.metadata.num_warps}
    for kind, data in (("cubin", made.asm["cubin"]), ("ptx", made.asm["ptx"].encode())):
        path = folder / target / f"{variant.name}.{kind}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        record |= {kind: f"{target}/{path.name}", f"{kind}_sha256": sha256(data).hexdigest()}
    record |= {
        "registers": max(int(count) for count in registers),
        "shared_bytes": made.metadata.shared,
        "stack_bytes": max(int(frame[0]) for frame in frames),
        "spill_bytes": sum(int(frame[1]) + int(frame[2]) for frame in frames),
    }
    return {
        "kernel": kernel.name,
        "grid": kernel.grid,
        "made_from": made_from(Path(str(import_module(kernel.function.__module__).__file__))),
        "target": target,
        "variant": {
            "name": variant.name,
            "constants": dict(variant.constants),
            "arguments": to_plain(arguments),
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
        },
        "binary": record,
    }


def _check_entry(name: str, made: Any, count: int) -> None:
    """The kernel takes as many parameters as the argument block has, and none of them is used scratch."""
    entry = _ENTRY.search(made.asm["ptx"])
    found = entry[1].count(".param") if entry else None
    if found != count:
        raise SafelightError(
            f"{name}: the compiled entry takes {found} parameters, the argument block has {count}; this "
            "triton passes arguments in a way that is not known here, use another version"
        )
    for what in _SCRATCH:
        if getattr(made.metadata, what, 0):
            raise SafelightError(f"{name} needs {what}, which no launcher here allocates; write it without")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile tasks `index`, `index + count`, ...; their records go to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("index", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("targets", nargs="+")
    call = parser.parse_args(arguments)
    try:
        todo = list(enumerate(tasks(load_kernels(call.source), call.targets)))
        done = [(at, compile_task(*task, call.folder)) for at, task in todo[call.index :: call.count]]
    except SafelightError as fault:
        print(str(fault), file=sys.stderr)
        return 1
    call.records.write_text(json.dumps({"triton": installed_triton(), "done": done}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
