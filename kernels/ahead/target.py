"""The GPU architectures that kernels are compiled for, and which of their machine code a given GPU runs.

From the CUDA programming guide: code for sm_XY runs on X.Z with Z >= Y; code that uses the features of one
architecture (suffix `a`, which Triton asks for from sm_90 on) runs on that one alone.
"""

from collections.abc import Iterable

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
_FIRST_EXACT = 90  # from here on the code is `sm_XYa`


def check_targets(names: Iterable[str]) -> tuple[str, ...]:
    """The names in the order of `TARGETS`, each once. Raises ValueError for an unknown one, or for none."""
    wanted = [name.strip() for name in names]
    if unknown := [name for name in wanted if name not in TARGETS]:
        raise ValueError(f"unknown target {unknown[0]!r}; allowed are {', '.join(TARGETS)}")
    if not wanted:
        raise ValueError(f"no target; name at least one of {', '.join(TARGETS)}")
    return tuple(name for name in TARGETS if name in wanted)


def number(target: str) -> int:
    """`sm_90` -> 90."""
    return int(target.removeprefix("sm_"))


def runs_on(targets: Iterable[str], capability: tuple[int, int]) -> str | None:
    """The one of `targets` whose code is best for a GPU of this compute capability, or None."""
    major, minor = capability
    here = 10 * major + minor
    usable = [
        target
        for target in targets
        if number(target) == here or (number(target) < _FIRST_EXACT and 10 * major <= number(target) <= here)
    ]
    return max(usable, key=number, default=None)
