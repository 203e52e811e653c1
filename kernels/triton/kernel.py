"""What a compiled kernel is: a Triton function, the variants that it is compiled in, and its launch grid.

The same record is read by the launchers, by the ahead-of-time compiler and by whoever loads its cubins from
C++. Knows no tensor, compiles nothing, and imports neither torch nor triton.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Constant = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Variant:
    """One compilation of a kernel: argument types and compile-time constants."""

    name: str
    """Unique in the project, such as `probe_rotate_bf16`; it names the variant in a manifest."""
    signature: Mapping[str, str]
    """Parameter -> Triton type, in the function's order: `*bf16`, `*fp32`, `i32`, `fp32`, `constexpr`."""
    constants: Mapping[str, Constant]
    """Values of the parameters whose type is `constexpr`."""
    aligned: tuple[str, ...]
    """Pointers and integers that every launch promises are multiples of 16 (bytes, or the number itself)."""
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        open_ones = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if open_ones != set(self.constants):
            raise ValueError(
                f"{self.name}: constexpr parameters {sorted(open_ones)} and constants "
                f"{sorted(self.constants)} must be the same; give each constexpr its value"
            )
        if strange := sorted(set(self.aligned) - set(self.signature)):
            raise ValueError(f"{self.name}: aligned names {strange}, which are no parameters; leave them out")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A Triton function, its variants, and the rule of its launch grid."""

    name: str
    """The operation that it is a body of, or a part of one, such as `guidance_step` or `safe_distance`."""
    function: Callable[..., Any]
    """What `triton.jit` made."""
    variants: tuple[Variant, ...]
    grid: str
    """Three whole numbers over named sizes and the variant's constants, such as
    `(ceil(n / BLOCK), requests * probes, 1)`; each file says what its sizes are."""

    def variant(self, name: str) -> Variant:
        """The variant of this name. Raises ValueError, which lists what there is."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise ValueError(
            f"{self.name} has no variant {name!r}; it has {[variant.name for variant in self.variants]}"
        )
