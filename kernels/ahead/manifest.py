"""`kernels.json`: every compiled variant, how it is launched, and the digest of each of its files.

All that a launcher in any language needs; compiles nothing, loads no driver.

**Argument block.** A kernel takes its arguments by value, in the order of `arguments`. Each has a
`type` (Triton's: `*fp16` is a device pointer), a `size_bytes` and an `offset_bytes`: the layout of a C struct
with natural alignment. Either hand `cuLaunchKernel` one pointer per argument (`kernelParams`), or the whole
block (`CU_LAUNCH_PARAM_BUFFER_POINTER`). Compile-time constants are not passed. Triton adds two trailing
pointers, `global_scratch` and `profile_scratch`; no kernel here uses them: pass null. An argument with
`aligned` must be a multiple of 16. Launch with `threads` threads in x, `shared_bytes` of dynamic shared
memory (above 48 KiB, `cuFuncSetAttribute` must allow it first) and the grid of the rule `grid`.
"""

import ast
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safelight import __version__
from safelight.containment import check_file, read_json
from safelight.errors import BundleError, SafelightError
from safelight.kernels import triton
from safelight.plain import from_plain, to_plain

MANIFEST = "kernels.json"
VERSION = 2
REMEDY = "build again with `safelight kernels build`"
# Triton's names -> the format character of `struct`; a pointer is 8 bytes
_FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H"}
FORMATS = _FORMATS | {"u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}
TRAILING = ("global_scratch", "profile_scratch")


def format_of(kind: str) -> str:
    """The `struct` character of an argument's type. Raises ValueError for a type that is not passed by
    value.
    """
    if kind.startswith("*"):
        return "P"
    if kind not in FORMATS:
        raise ValueError(f"an argument of type {kind!r} cannot be launched; allowed are {sorted(FORMATS)}")
    return FORMATS[kind]


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a launch, at `offset_bytes` of the argument block."""

    name: str
    type: str
    offset_bytes: int
    size_bytes: int
    aligned: bool

    def __post_init__(self) -> None:
        if struct.calcsize(format_of(self.type)) != self.size_bytes:
            raise ValueError(f"{self.name}: {self.type} does not have {self.size_bytes} bytes")


def lay_out(signature: Mapping[str, str], aligned: Sequence[str]) -> tuple[Argument, ...]:
    """The argument block of a function: its parameters less the constants, and Triton's trailing pointers."""
    passed = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    passed += [(name, "*i8") for name in TRAILING]
    made, end = [], 0
    for name, kind in passed:
        size = struct.calcsize(format_of(kind))
        offset = -(-end // size) * size
        made.append(Argument(name, kind, offset, size, name in aligned))
        end = offset + size
    return tuple(made)


@dataclass(frozen=True, slots=True)
class Binary:
    """A variant compiled for one target. Paths are relative to the folder; registers are a thread's.

    `stack_bytes` is a thread's local memory, which holds spilled registers and arrays that are indexed at run
    time; `spill_bytes` the bytes that the assembler says it stores and loads for want of registers.
    """

    cubin: str
    cubin_sha256: str
    ptx: str
    ptx_sha256: str
    entry: str
    threads: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


@dataclass(frozen=True, slots=True)
class CompiledVariant:
    """One compilation of a kernel; `binaries` by target."""

    name: str
    constants: Mapping[str, Any]
    arguments: tuple[Argument, ...]
    num_warps: int
    num_stages: int
    binaries: Mapping[str, Binary]

    def __post_init__(self) -> None:
        own = self.arguments[: -len(TRAILING)]
        signature = {item.name: item.type for item in own}
        if self.arguments != lay_out(signature, [item.name for item in own if item.aligned]):
            raise ValueError(f"{self.name}: its arguments do not lie as a C struct's members do")


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A kernel with the rule of its launch grid, as `kernels.triton.kernel.Kernel` states it.

    `sources` are the files of `kernels/triton` that it was made from, with their SHA-256.
    """

    name: str
    grid: str
    sources: Mapping[str, str]
    variants: tuple[CompiledVariant, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError(f"{self.name} names no file that it was made from")

    def check_fresh(self, *, sources: Mapping[str, str] | None = None) -> None:
        """Raises SafelightError where a file that the kernel was made from is another one here, or none."""
        here = file_digests() if sources is None else sources
        if other := [name for name, digest in self.sources.items() if here.get(name) != digest]:
            raise SafelightError(
                f"the kernel {self.name} was compiled from another {', '.join(other)} than is here; {REMEDY}"
            )


@dataclass(frozen=True, slots=True)
class KernelManifest:
    """What a folder of compiled kernels holds, and from what it was made."""

    safelight: str
    triton: str
    targets: tuple[str, ...]
    kernels: tuple[CompiledKernel, ...]
    safelight_kernels: int = VERSION

    def __post_init__(self) -> None:
        for variant in (item for kernel in self.kernels for item in kernel.variants):
            if set(variant.binaries) != set(self.targets):
                raise ValueError(f"{variant.name} is compiled for other targets than {list(self.targets)}")

    def variant(self, name: str) -> CompiledVariant:
        """The variant of this name. Raises ValueError, which lists what there is."""
        return next(item for item in self.kernel_of(name).variants if item.name == name)

    def kernel_of(self, name: str) -> CompiledKernel:
        """The kernel that has the variant of this name. Raises ValueError, which lists what there is."""
        found = {item.name: kernel for kernel in self.kernels for item in kernel.variants}
        if name not in found:
            raise ValueError(f"no compiled variant {name!r}; the folder has {sorted(found)}")
        return found[name]

    def write(self, folder: Path) -> Path:
        """Put the manifest into `folder`; the same value always gives the same bytes."""
        path = folder / MANIFEST
        path.write_text(json.dumps(to_plain(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: Path) -> "KernelManifest":
        """Read the manifest; files are checked when they are read, by `read_part`. Raises SafelightError."""
        path = folder / MANIFEST
        if not path.is_file():
            raise SafelightError(f"{folder} holds no {MANIFEST}; {REMEDY} --out {folder}")
        values = read_json(path)
        if values.get("safelight_kernels") != VERSION:
            raise SafelightError(
                f"{path}: format {values.get('safelight_kernels')!r} is unknown, this safelight reads "
                f"{VERSION}; {REMEDY}"
            )
        try:
            manifest: KernelManifest = from_plain(cls, values, "manifest")
        except ValueError as fault:
            raise SafelightError(f"{path} is not a manifest of kernels ({fault}); {REMEDY}") from None
        return manifest

    def check_fresh(self) -> None:
        """Raises SafelightError where the folder was made by another safelight, or another Triton than the
        installed one (where none is installed there is nothing to differ from).
        """
        if self.safelight != __version__:
            raise SafelightError(
                f"the kernels were compiled by safelight {self.safelight}, this is {__version__}; {REMEDY}"
            )
        if (here := installed_triton()) not in (None, self.triton):
            raise SafelightError(
                f"the kernels were compiled by triton {self.triton}, installed is {here}; {REMEDY}"
            )


def read_part(folder: Path, name: str, expected: str) -> bytes:
    """The bytes of a file of the folder, once they have the digest `expected`. Raises SafelightError."""
    try:
        check_file(folder, name, links=True)
    except BundleError as fault:
        raise SafelightError(f"{str(fault).partition(';')[0]}; {REMEDY}") from None
    data = (folder / name).read_bytes()
    if sha256(data).hexdigest() != expected:
        raise SafelightError(f"{folder / name} was altered: its SHA-256 is not the manifest's; {REMEDY}")
    return data


def file_digests() -> dict[str, str]:
    """SHA-256 of each Python file of `kernels/triton`, by name."""
    folder = Path(str(triton.__file__)).parent
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))}


def made_from(path: Path) -> list[str]:
    """The file at `path`, if it is one of `kernels/triton`, and all of these that it imports, or they do."""
    folder = Path(str(triton.__file__)).parent
    found, todo = set(), [path]
    while todo:
        here = todo.pop()
        found.add(here)
        for node in ast.walk(ast.parse(here.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(triton.__name__):
                inside = str(node.module).removeprefix(triton.__name__).strip(".")
                names = [inside] if inside else [item.name for item in node.names]
                files = {folder / f"{name}.py" for name in names}
                todo += [file for file in files - found if file.is_file()]
    return sorted(file.name for file in found if file.parent == folder)


def installed_triton() -> str | None:
    """The version of the installed Triton; it is not imported."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
