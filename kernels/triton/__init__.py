"""Compiled bodies of the operations, one file each. Knows tensors, no model; importing it loads no Triton."""

from safelight.kernels.triton.kernel import Kernel


def kernels() -> tuple[Kernel, ...]:
    """Every kernel of the project. Imports triton, and so needs it installed."""
    from safelight.kernels.triton import (
        clip_input,
        concept_vote,
        guidance_moments,
        guidance_step,
        latent_to_x0,
        probe_rotate,
    )

    files = (probe_rotate, guidance_moments, guidance_step, latent_to_x0, clip_input)
    return (*(file.KERNEL for file in files), clip_input.RUNS, concept_vote.MARGINS, concept_vote.KERNEL)
