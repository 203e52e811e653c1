"""Compiled bodies of the operations, one file each. Knows tensors, no model; importing this loads no Triton."""

from safelight.kernels.triton.kernel import Kernel


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the project. Imports triton, and so needs it installed."""
    return ()
