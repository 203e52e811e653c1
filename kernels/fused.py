"""What lies between two networks as one operation each: compositions of `kernels.reference`, and the
definition of the compiled bodies.

Inputs and outputs may be float16, bfloat16 or float32, arithmetic is float32. All that changes from call to
call comes in tensors, so that a captured graph can be replayed. Opens no model and runs no network.

R requests, P probes, L tokens, D width, B branches of guidance, S steps, C concepts. Where an operation takes
`finite`, bool (R, P), it clears the entries of whatever it saw that is not finite, and never sets one. `out`
is written where it is given, else a new tensor is returned.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.kernels import reference
from safelight.kernels.philox import Stream, split_seed

INPUT_SCALE = 0  # column of a step table


@dataclass(frozen=True, slots=True)
class Directions:
    """Where probes turn to: `first` is the stream of u, the next one is v's; `circle` is the number of places
    on the circle of circular probes, spaced evenly, or None for spherical probes, each with a u of its own.
    """

    first: Stream
    circle: int | None = None

    def __post_init__(self) -> None:
        if self.first not in (Stream.LATENT_U, Stream.PROMPT_U, Stream.IMAGE_U, Stream.POOLED_U):
            raise ValueError(f"first must be the stream of a first direction; got {self.first!r}; take a _U")
        if self.circle is not None and self.circle < 1:
            raise ValueError(
                f"a circle has at least 1 place; got {self.circle}; None is for spherical probes"
            )


@dataclass(frozen=True, slots=True)
class Concepts:
    """A safety checker's constants: embeds (C, D), thresholds (C,), special_embeds (S, D), special_thresholds
    (S,).
    """

    embeds: Tensor
    thresholds: Tensor
    special_embeds: Tensor
    special_thresholds: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What a step of the sampler makes: x and x0 (R, ...), and `model_in` (B, R, ...), the input of the next
    call of the denoiser, the same in each branch. `distance` float32 (R,) is `reference.safe_branch`'s, and
    None where there are not three branches.
    """

    x: Tensor
    x0: Tensor
    model_in: Tensor
    distance: Tensor | None = None


def seed_bits(seed: int) -> int:
    """A 64-bit seed as the int64 of the same bits, for a tensor of seeds. Raises ValueError outside [0,
    2**64).
    """
    low, high = split_seed(seed)
    return (((high ^ 1 << 31) - (1 << 31)) << 32) | low


def probe_rotate(
    z: Tensor,
    seeds: Tensor,
    angle: Tensor,
    *,
    numbers: Tensor,
    directions: Directions,
    mask: Tensor | None = None,
    finite: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Probes of z by `reference.probe_rotate`, along directions drawn from the seeds: (R, P, ...), in z's
    dtype.

    z (R, L, D), of which each token turns by itself, or (R, D); seeds int64 (R,), see `seed_bits`; angle
    float32 (R,), radians, for every probe but number 0, whose angle is 0; numbers int64 (P,), at least 0: the
    probes' own numbers; mask bool (R, L): tokens where it is False stay as they are. A request whose angle
    is not finite, or whose z, is not finite in all its probes.
    """
    turned = _turned(z.float(), seeds, angle, numbers=numbers, directions=directions, mask=mask)
    if finite is not None:
        finite &= (torch.isfinite(angle) & _whole(z, 1))[:, None]
    return _into(out, turned, z.dtype)


def probe_latents(
    seeds: Tensor,
    angle: Tensor,
    *,
    shape: tuple[int, ...],
    numbers: Tensor,
    directions: Directions,
    out: Tensor | None = None,
) -> Tensor:
    """Probes of starting latents that are drawn from the seeds themselves, float32 (R, P, *shape) or `out`'s
    dtype.

    The latents of a request are `Stream.LATENT`'s normals, turned as a whole as by `probe_rotate`.
    """
    size = math.prod(shape)
    drawn = [reference.philox_normals(_seed(bits), Stream.LATENT, size, probe=0) for bits in seeds.tolist()]
    z = torch.stack(drawn).to(seeds.device) if drawn else torch.zeros(0, size, device=seeds.device)
    turned = _turned(z, seeds, angle, numbers=numbers, directions=directions, mask=None)
    return _into(out, turned.reshape(len(z), len(numbers), *shape), torch.float32)


def guidance_step(
    x: Tensor,
    answers: Tensor,
    x0_prev: Tensor,
    *,
    scale: Tensor,
    table: Tensor,
    step: Tensor,
    strength: Tensor | None = None,
    threshold: Tensor | None = None,
    rescale: Tensor | None = None,
    out: Step | None = None,
) -> Step:
    """Guidance, the solver's update and the next input of the denoiser; x and x0 in x's dtype, the input in
    the answers'.

    x, x0_prev (R, ...); answers (B, R, ...), the denoiser's, by branch: conditional alone (no guidance), free
    and conditional, or free, redirected and conditional, which needs strength and threshold float32 (R,) of
    `reference.safe_branch`. scale float32 (R,); rescale float32 (R,) in [0, 1] is the amount of
    `reference.rescale_guidance`; table float32 (S, 6), `StepTable.coefficients`; step int64 (1,), the row to
    take, in [0, S), which stays as it is. The next input is scaled for the row after it; after the last row,
    where no call follows, for the last. `out` may share memory with x and x0_prev.
    """
    answered, conditional, distance = answers.float(), answers[-1].float(), None
    if len(answers) == 3:
        if strength is None or threshold is None:
            raise ValueError("three branches need strength and threshold, float32 (R,); give both")
        free, distance = reference.safe_branch(
            answered[0], answered[1], strength=strength, threshold=threshold
        )
    else:
        free = answered[0]
    guided = reference.guide(free, conditional, scale) if len(answers) > 1 else conditional
    if rescale is not None and len(answers) > 1:
        guided = reference.rescale_guidance(guided, conditional, rescale)
    row, after = table[step[0]].float(), table[(step[0] + 1).clamp(max=len(table) - 1)].float()
    moved, x0 = reference.scheduler_step(x, guided, x0_prev, row)
    following = (after[INPUT_SCALE] * moved).expand(answers.shape)
    if out is None:
        return Step(moved.to(x.dtype), x0.to(x.dtype), following.to(answers.dtype), distance)
    for into, value in ((out.x, moved), (out.x0, x0), (out.model_in, following)):
        into.copy_(value)
    if out.distance is not None and distance is not None:
        out.distance.copy_(distance)
    return out


def latent_to_x0(
    latents: Tensor,
    answers: Tensor,
    *,
    x0_z: float,
    x0_out: float,
    scaling_factor: float = 1.0,
    finite: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The clean latents of a one-step model, over the decoder's scaling factor: (x0_z latents + x0_out
    answers) / scaling_factor.

    latents (R, P, ...), unit normals, which may be expanded over P; answers (R, P, ...), the denoiser's; x0_z
    and x0_out of `safelight.schedule.OneStep`. A factor of 1 leaves x0 as a latent checker takes it. Returns
    (R, P, ...) in the dtype of the answers; a probe is not finite where x0 is not.
    """
    x0 = x0_z * latents.float() + x0_out * answers.float()
    if finite is not None:
        finite &= _whole(x0, 2)
    return _into(out, x0 / scaling_factor, answers.dtype)


def clip_input(
    decoded: Tensor,
    size: int,
    *,
    mean: Tensor,
    deviation: Tensor,
    finite: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A decoder's answer to the checker's input, by `reference.clip_input` of `decoded / 2 + 1/2` in [0, 1].

    decoded (N, 3, H, W), about [-1, 1], in any memory order; mean, deviation float32 (3,); finite bool, N
    entries. Returns (N, 3, size, size) in decoded's dtype. A picture is not finite where anything in it is
    not, cropped or not, since an infinity would be clipped to a colour.
    """
    values = decoded.float()
    if finite is not None:
        finite &= _whole(values, 1).view(finite.shape)
    pictures = torch.where(torch.isfinite(values), (values / 2 + 0.5).clamp(0, 1), torch.nan)
    return _into(out, reference.clip_input(pictures, size, mean, deviation), decoded.dtype)


def margin_vote(margins: Tensor, finite: Tensor, need: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`reference.vote` in one block float32 (R, P (C + 2) + 2), which `split_block` takes apart.

    margins (R, P, C); finite bool (R, P), of all that came before; need int64 (R,).
    """
    flagged, whole, score, blocked = reference.vote(margins.float(), finite, need)
    parts = (margins.float().flatten(1), flagged, whole, score[:, None], blocked[:, None])
    return _into(out, torch.cat([part.float() for part in parts], 1), torch.float32)


def concept_vote(
    image_embeds: Tensor, finite: Tensor, need: Tensor, *, concepts: Concepts, out: Tensor | None = None
) -> Tensor:
    """The checker's margins (`reference.concept_margins`) of image_embeds (R, P, D), and `margin_vote` on
    them.
    """
    margins = reference.concept_margins(
        image_embeds.flatten(0, 1),
        concepts.embeds,
        concepts.thresholds,
        concepts.special_embeds,
        concepts.special_thresholds,
    )
    return margin_vote(margins.view(*image_embeds.shape[:2], -1), finite, need, out=out)


def split_block(block: Tensor, probes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The parts of a block of P probes: margins (R, P, C), flagged, finite bool (R, P), score (R,), blocked
    bool (R,).

    Raises ValueError where the block is not one of P probes.
    """
    concepts, rest = divmod(block.shape[-1] - 2, probes) if probes else (0, -1)
    if rest or concepts < 3:
        raise ValueError(f"a block of {probes} probes has P (C + 2) + 2 columns; got {block.shape[-1]}")
    cut = probes * (concepts - 2)
    margins = block[:, :cut].reshape(len(block), probes, concepts - 2)
    flagged, finite = block[:, cut : cut + probes] != 0, block[:, cut + probes : -2] != 0
    return margins, flagged, finite, block[:, -2], block[:, -1] != 0


def _turned(
    z: Tensor,
    seeds: Tensor,
    angle: Tensor,
    *,
    numbers: Tensor,
    directions: Directions,
    mask: Tensor | None,
) -> Tensor:
    """Z (R, ..., D) at the probes' angles, along directions of their seeds: (R, P, ..., D)."""
    rows = numbers.tolist()
    shape = (len(z), len(rows), *z.shape[1:])
    u, v, phase = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.float64)
    size = math.prod(shape[2:])
    for request, bits in enumerate(seeds.tolist()):
        for at, number in enumerate(rows):
            places, probe = directions.circle, 0 if directions.circle else number
            drawn = reference.philox_normals(_seed(bits), directions.first, size, probe=probe)
            u[request, at] = drawn.view(shape[2:])
            if places:
                second = Stream(directions.first + 1)
                v[request, at] = reference.philox_normals(_seed(bits), second, size, probe=0).view(shape[2:])
                word = reference.philox_words(_seed(bits), Stream.PHASE, 1, probe=0)
                offset = (float(word) + 0.5) * 2.0**-32
                phase[request, at] = (number - 1 + offset) * (2 * math.pi / places)
    angles = torch.where(numbers == 0, 0.0, angle.float()[:, None])
    u, v, phase = u.to(z.device), v.to(z.device), phase.float().to(z.device)
    return reference.probe_rotate(z, u, v, angles, phase, mask)


def _seed(bits: int) -> int:
    return bits % 2**64


def _whole(values: Tensor, kept: int) -> Tensor:
    """Whether all is finite, over all axes but the first `kept`."""
    return torch.isfinite(values).flatten(kept).all(-1)


def _into(out: Tensor | None, value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if out is None else out.copy_(value)
