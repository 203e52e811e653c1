"""Compiled bodies of the operations, one file each. Knows tensors, no model; importing it loads no Triton."""

from safelight.kernels.triton.kernel import Kernel


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the project. Imports triton, and so needs it installed."""
    from safelight.kernels.triton import guidance_moments, guidance_step, probe_rotate

    return (probe_rotate.KERNEL, guidance_moments.KERNEL, guidance_step.KERNEL)
