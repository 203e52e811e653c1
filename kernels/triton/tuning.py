"""Block sizes, warps and stages of the kernels, by GPU: a committed table, so that nothing is tuned while
serving.

`bench/tune_kernels.py` measures candidates on a GPU and prints the entry to put here. The default entry was
chosen by register and memory use of the compiled code, not measured.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Setting:
    """Elements of a program, 0 where the sizes decide it, and warps and stages that it is compiled for."""

    block: int
    num_warps: int
    num_stages: int = 1


# GPU name as torch gives it -> kernel -> largest block that the setting is for -> setting
TABLE: Mapping[str, Mapping[str, Mapping[int, Setting]]] = {
    DEFAULT: {
        "probe_rotate": {
            256: Setting(256, 1),
            1024: Setting(1024, 4),
            2048: Setting(2048, 8),
            4096: Setting(4096, 16),
        },
        "guidance_moments": {1024: Setting(1024, 4)},
        "guidance_step": {1024: Setting(1024, 4)},
        "latent_to_x0": {1024: Setting(1024, 4)},
        "resize_axis": {256: Setting(256, 4)},
        "resize_runs": {256: Setting(256, 1)},  # 8 elements a thread: 16 bytes of float16
        "concept_margins": {256: Setting(256, 8)},
        "margin_vote": {0: Setting(0, 1)},
    }
}


_tried: ContextVar[tuple[str, Setting] | None] = ContextVar("safelight_kernel_setting", default=None)


@contextmanager
def use_setting(kernel: str, setting: Setting) -> Iterator[None]:
    """Launch this kernel with this setting inside the block, whatever the table says: for measuring it."""
    token = _tried.set((kernel, setting))
    try:
        yield
    finally:
        _tried.reset(token)


def setting(kernel: str, gpu: str = DEFAULT, *, size: int = 0) -> Setting:
    """The setting of a kernel for rows of `size` elements: the first whose block holds them, else the
    largest.
    """
    tried = _tried.get()
    if tried is not None and tried[0] == kernel:
        return tried[1]
    choices = TABLE.get(gpu, {}).get(kernel) or TABLE[DEFAULT][kernel]
    fits = [block for block in sorted(choices) if block >= size]
    return choices[fits[0] if fits else max(choices)]
