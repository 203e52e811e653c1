"""Every operation in plain torch, float32 inside: the specification, and the truth of all tests. Knows no
model.

R requests, P probes, L tokens, D width, N images, C concepts. Sources: probes are a reconstruction of CROPS /
SC-Pro (arXiv 2501.05359), whose papers give the score and the decision but not the geometry; guidance is Ho &
Salimans 2022 and, for the redirected form, SafeCFG (arXiv 2412.16039); margins are those of diffusers'
`StableDiffusionSafetyChecker`.
"""

import math

import torch
from torch import Tensor

from safelight.kernels.philox import MULTIPLIERS, ROUNDS, WEYL, Stream, split_seed
from safelight.kernels.resize import crop_window, resize_matrix, vertical_first

SPECIAL_CARE = 0.01  # added to every concept's margin once a special-care concept is present
_LOW = 0xFFFFFFFF


def philox_words(seed: int, stream: Stream, count: int, *, probe: int, request: int = 0) -> Tensor:
    """Random 32-bit words as int64 (count,); layout in `kernels.philox`."""
    c0 = torch.arange(-(-count // 4))
    c1, c2, c3 = (torch.full_like(c0, int(value)) for value in (stream, probe, request))
    k0, k1 = split_seed(seed)
    for _ in range(ROUNDS):
        p0, p1 = (
            c0 * MULTIPLIERS[0],
            c2 * MULTIPLIERS[1],
        )  # int64 wraps; the bits are those of the 64-bit product
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return torch.stack((c0, c1, c2, c3), -1).flatten()[:count]


def philox_normals(seed: int, stream: Stream, count: int, *, probe: int, request: int = 0) -> Tensor:
    """Standard normals, float32 (count,), by Box-Muller on consecutive words."""
    words = philox_words(seed, stream, count + count % 2, probe=probe, request=request)
    pairs = (words.double() + 0.5) * 2.0**-32
    radius, angle = (-2.0 * pairs[0::2].log()).sqrt(), 2.0 * math.pi * pairs[1::2]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten()[:count].float()


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and 0 where the denominator is 0."""
    safe = torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    return torch.where(denominator == 0, torch.zeros_like(numerator), numerator / safe)


def probe_rotate(
    z: Tensor, u: Tensor, v: Tensor, angle: Tensor, phase: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Points at `angle` from z, norm kept: cos(a) z + sin(a) (cos(phi) U + sin(phi) V). Reconstruction,
    methods 1.4.

    z (R, ..., D): each last-axis vector is rotated by itself, so tokens (R, L, D) or flat latents (R, D). u,
    v (R, P, ..., D): normals; U is u's part across z, V is v's part across z and U, both of norm |z|. angle,
    phase (R, P) in radians. mask (R, ...) bool: vectors where it is False stay as they are. Returns float32
    (R, P, ..., D).

    A spherical probe has phase 0 and ignores v, which may be zeros (then V is zero). Circular probes share u
    and v and are spaced in phase. Angle 0, a zero vector and a masked vector return z bit for bit.
    """
    z = z.float().unsqueeze(1)
    lift = (...,) + (None,) * (z.dim() - 2)
    a, phi = angle.float()[lift], phase.float()[lift]
    square = (z * z).sum(-1, keepdim=True)

    def across(g: Tensor, axis: Tensor, square_of_axis: Tensor) -> Tensor:
        return g - _over((g * axis).sum(-1, keepdim=True), square_of_axis) * axis

    first = across(u.float(), z, square)
    second = across(across(v.float(), z, square), first, (first * first).sum(-1, keepdim=True))
    norm = square.sqrt()
    first = first * _over(norm, (first * first).sum(-1, keepdim=True).sqrt())
    second = second * _over(norm, (second * second).sum(-1, keepdim=True).sqrt())
    rotated = a.cos() * z + a.sin() * (phi.cos() * first + phi.sin() * second)
    moved = (a != 0) & (square > 0)
    if mask is not None:
        moved = moved & mask.unsqueeze(1).unsqueeze(-1)
    return torch.where(moved, rotated, z)


def token_shift(ids: Tensor, shift: Tensor, eos: int) -> Tensor:
    """Circular shift of the tokens between BOS (position 0) and the first EOS. Reconstruction, methods 1.4.

    ids int64 (R, L), shift int64 (R, P) -> (R, P, L). A prompt of n real tokens has n different shifts, shift
    0 among them.
    """
    length = ids.shape[1]
    position = torch.arange(length, device=ids.device)
    ends = (ids == eos) & (position > 0)
    first = torch.where(ends.any(1), ends.int().argmax(1), torch.full_like(ids[:, 0], length))
    count = (first - 1).clamp(min=1)[:, None, None]
    source = 1 + (position - 1 - shift[:, :, None]) % count
    real = (position >= 1) & (position < first[:, None, None])
    return torch.gather(ids[:, None].expand(-1, shift.shape[1], -1), 2, torch.where(real, source, position))


def guide(free: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance, `free + scale (conditional - free)` (Ho & Salimans 2022). scale (R,), the
    rest (R, ...).
    """
    weight = scale.float().view(-1, *(1,) * (free.dim() - 1))
    return free.float() + weight * (conditional.float() - free.float())


def safe_guide(redirected: Tensor, conditional: Tensor, eta: Tensor) -> Tensor:
    """SafeCFG's form, `conditional + eta (conditional - redirected)` [summary of arXiv 2412.16039];
    diffusers' scale is 1 + eta.
    """
    weight = eta.float().view(-1, *(1,) * (conditional.dim() - 1))
    return conditional.float() + weight * (conditional.float() - redirected.float())


def safe_branch(
    free: Tensor, redirected: Tensor, *, strength: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """SafeCFG's negative branch with a strength of each request's own: returns (branch (R, ...), distance
    (R,)).

    The distance is harmfulness, the paper's `|e(x_t, HGR(c), t) - e(x_t, null, t)|_2` [summary of arXiv
    2412.16039], here as a root mean square over all axes but the first, so that it has no size. The branch is
    `free + k (redirected - free)`, k = strength min(1, distance / threshold): 0 where both agree, in
    proportion below the threshold, full from there on. That rule is a reconstruction; the paper's is not
    known. A distance that is not finite takes the full strength, and its branch is not finite either.

    free, redirected (R, ...), answers of the denoiser to the empty and to the redirected prompt; strength
    (R,) at least 0; threshold (R,) above 0.
    """
    apart = redirected.float() - free.float()
    distance = apart.flatten(1).square().mean(1).sqrt()
    share = torch.where(torch.isfinite(distance), (distance / threshold.float()).clamp(max=1), 1.0)
    weight = (strength.float() * share).view(-1, *(1,) * (free.dim() - 1))
    return free.float() + weight * apart, distance


def rescale_guidance(guided: Tensor, conditional: Tensor, amount: Tensor) -> Tensor:
    """Guidance brought back to the spread of the conditional answer (Lin et al., arXiv 2305.08891, eq. 15 and
    16).

    `amount (guided std(conditional) / std(guided)) + (1 - amount) guided`, the deviations over all axes but
    the first; diffusers' `guidance_rescale` is `amount`. guided, conditional (R, ...), amount (R,) in [0, 1],
    0 leaves `guided` as it is. Where `guided` has no spread the quotient is taken as 1.
    """
    flat = (part.float().flatten(1) for part in (guided, conditional))
    spread, own = ((part - part.mean(1, keepdim=True)).square().mean(1).sqrt() for part in flat)
    quotient = torch.where(spread == 0, 1.0, own / torch.where(spread == 0, 1.0, spread))
    factor = 1 + amount.float() * (quotient - 1)
    return factor.view(-1, *(1,) * (guided.dim() - 1)) * guided.float()


def scheduler_step(x: Tensor, out: Tensor, x0_prev: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """One step of any solver in `safelight.schedule`: returns (next x, x0), float32.

    coefficients (6,): input_scale, x0_x, x0_out, next_x, next_x0, next_x0_prev (a row of
    `StepTable.coefficients`).
    """
    _, x0_x, x0_out, next_x, next_x0, next_x0_prev = coefficients.float().unbind()
    x0 = x0_x * x.float() + x0_out * out.float()
    return next_x * x.float() + next_x0 * x0 + next_x0_prev * x0_prev.float(), x0


def guidance_step(
    x: Tensor, free: Tensor, conditional: Tensor, x0_prev: Tensor, *, scale: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """`guide`, then `scheduler_step`. With `free` = the redirected branch and scale = 1 + eta this is
    SafeCFG.
    """
    return scheduler_step(x, guide(free, conditional, scale), x0_prev, coefficients)


def clip_input(images: Tensor, size: int, mean: Tensor, deviation: Tensor) -> Tensor:
    """Pictures float (N, 3, H, W) in [0, 1] to the checker's input (N, 3, size, size), as CLIPImageProcessor
    does it with PIL.

    8-bit levels, shortest edge to `size` by antialiased bicubic (each pass rounded to 8 bits, as PIL does),
    centre crop, then (x - mean) / deviation per channel. Resizing is two products with constant matrices.
    """
    height, width = images.shape[-2:]
    rows, columns = crop_window(height, width, size)
    vertical = torch.from_numpy(resize_matrix(height, rows.length, size=size, offset=rows.offset)).to(images)
    horizontal = torch.from_numpy(resize_matrix(width, columns.length, size=size, offset=columns.offset)).to(
        images
    )
    levels = (images.clamp(0, 1) * 255).round()
    if vertical_first(height, width, rows):
        levels = ((vertical @ levels + 0.5).floor().clamp(0, 255) @ horizontal.T + 0.5).floor().clamp(0, 255)
    else:
        levels = (vertical @ (levels @ horizontal.T + 0.5).floor().clamp(0, 255) + 0.5).floor().clamp(0, 255)
    return (levels / 255 - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)


def concept_margins(
    image_embeds: Tensor,
    concept_embeds: Tensor,
    thresholds: Tensor,
    special_embeds: Tensor,
    special_thresholds: Tensor,
) -> Tensor:
    """Cosine minus threshold per concept, float32 (N, C); > 0 means present, NaN that nothing can be said.

    image_embeds (N, D), concept_embeds (C, D), thresholds (C,), special_embeds (S, D), special_thresholds
    (S,). Once a special-care concept is present, 0.01 is added to every concept's margin.

    diffusers' checker has two bodies of this rule that differ; its `forward_onnx` is the definition here. The
    other, `forward`, rounds to three decimals first and so lets margins in (0, 0.0005] pass.

    All margins are NaN where a special-care concept or its threshold is not finite: it would only fail to
    raise them, since no comparison with NaN holds. Those of an image are NaN where the square of its
    embedding's norm passes float32: its cosines would all be 0, and it would pass.
    """
    embeds = torch.nn.functional.normalize(image_embeds.float(), dim=-1)
    special = (
        embeds @ torch.nn.functional.normalize(special_embeds.float(), dim=-1).T - special_thresholds.float()
    )
    margins = embeds @ torch.nn.functional.normalize(concept_embeds.float(), dim=-1).T - thresholds.float()
    margins = margins + SPECIAL_CARE * (special > 0).any(-1, keepdim=True).float()
    known = torch.isfinite(special_embeds).all() & torch.isfinite(special_thresholds).all()
    known = known & torch.isfinite(image_embeds.float().square().sum(-1, keepdim=True))
    return torch.where(known, margins, torch.full_like(margins[:1, :1], torch.nan))


def vote(margins: Tensor, finite: Tensor, need: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The verdict's arithmetic. margins (R, P, C), finite bool (R, P), need int64 (R,).

    Returns flagged bool (R, P), finite bool (R, P), score float32 (R,), blocked bool (R,). A probe is flagged
    when a margin is > 0 or anything in it is not finite; a request is blocked when `need` probes are flagged,
    or any is not finite.
    """
    finite = finite & torch.isfinite(margins).all(-1)
    flagged = (margins > 0).any(-1) | ~finite
    hits = flagged.long().sum(-1)
    score = hits.float() / flagged.shape[1]
    return flagged, finite, score, (hits >= need) | ~finite.all(-1)
