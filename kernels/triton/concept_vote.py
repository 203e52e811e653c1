"""From image embeddings to the one block that goes back to the host: margins of every concept, then the vote.

Bodies of `fused.concept_vote` and `fused.margin_vote`, in two launches and in one. The first gives each probe
a program, for the concepts' constants are larger than all probes together; the second gives one to each
request, and also serves a latent checker, which answers in margins. Comparisons are written so that whatever
is not a number counts as flagged and as not finite.
Grid sizes: probes of all requests; requests.
"""
# The parameters of jitted functions are Triton values, which have no types here.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return"

import torch
import triton
import triton.language as tl
from torch import Tensor

from safelight.kernels.fused import Concepts
from safelight.kernels.reference import SPECIAL_CARE
from safelight.kernels.triton.checks import FLOATS, dense, row_strides, shaped, together, typed
from safelight.kernels.triton.kernel import Kernel, Variant
from safelight.kernels.triton.launch import Argument, launch, tuned
from safelight.kernels.triton.tuning import setting

_CARE = tl.constexpr(SPECIAL_CARE)
_TINY = tl.constexpr(1e-12)  # the least norm that is divided by, as in torch's normalize


@triton.jit
def _rows(matrix, start, width, count, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """A tile (ROWS, BLOCK) of a matrix (count, width) as float32, 0 outside of it."""
    row, at = tl.arange(0, ROWS)[:, None], start + tl.arange(0, BLOCK)[None, :]
    inside = (row < count) & (at < width)
    return tl.load(matrix + row * width + at, inside, other=0.0).to(tl.float32)


@triton.jit
def _norm(square):
    """A norm from its square, not below the least; what is not a number stays so."""
    norm = tl.sqrt(square)
    return tl.where(norm < _TINY, _TINY, norm)


@triton.jit(do_not_specialize=["probes", "concepts", "specials"])
def _concept_margins(
    embeds,
    concept_embeds,
    thresholds,
    special_embeds,
    special_thresholds,
    block,
    width,
    probes,
    concepts,
    specials,
    embed_request,
    embed_probe,
    CONCEPTS: tl.constexpr,  # noqa: N803
    SPECIALS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    request, probe = row // probes, row % probes
    embeds += request * embed_request + probe * embed_probe
    square, odd = 0.0, 0
    dots, squares = tl.zeros((CONCEPTS,), tl.float32), tl.zeros((CONCEPTS,), tl.float32)
    special_dots, special_squares = tl.zeros((SPECIALS,), tl.float32), tl.zeros((SPECIALS,), tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        embed = tl.load(embeds + at, at < width, other=0.0).to(tl.float32)
        square += tl.sum(embed * embed)
        tile = _rows(concept_embeds, start, width, concepts, CONCEPTS, BLOCK)
        dots += tl.sum(tile * embed[None, :], 1)
        squares += tl.sum(tile * tile, 1)
        tile = _rows(special_embeds, start, width, specials, SPECIALS, BLOCK)
        special_dots += tl.sum(tile * embed[None, :], 1)
        special_squares += tl.sum(tile * tile, 1)
        odd += tl.sum((~(tl.abs(tile) < float("inf"))).to(tl.int32))
    odd += tl.where(square < float("inf"), 0, 1)  # over an infinite norm every cosine would be 0
    norm = _norm(square)
    which = tl.arange(0, SPECIALS)
    limit = tl.load(special_thresholds + which, which < specials, other=0.0)
    odd += tl.sum((~(tl.abs(limit) < float("inf"))).to(tl.int32))
    close = special_dots / (norm * _norm(special_squares)) - limit > 0
    present = tl.sum((close & (which < specials)).to(tl.int32)) > 0
    concept = tl.arange(0, CONCEPTS)
    threshold = tl.load(thresholds + concept, concept < concepts, other=0.0)
    margins = dots / (norm * _norm(squares)) - threshold + tl.where(present, _CARE, 0.0)
    margins = tl.where(odd > 0, float("nan"), margins)  # something that cannot be compared
    into = block + request * (probes * (concepts + 2) + 2) + probe * concepts
    tl.store(into + concept, margins, concept < concepts)


@triton.jit(do_not_specialize=["probes", "concepts", "margin_request", "margin_probe"])
def _margin_vote(
    margins,
    finite,
    need,
    block,
    probes,
    concepts,
    margin_request,
    margin_probe,
    COPIED: tl.constexpr,  # noqa: N803
    PROBES: tl.constexpr,  # noqa: N803
    CONCEPTS: tl.constexpr,  # noqa: N803
):
    request = tl.program_id(0).to(tl.int64)
    probe, concept = tl.arange(0, PROBES), tl.arange(0, CONCEPTS)
    real = probe < probes
    inside = real[:, None] & (concept < concepts)[None, :]
    spot = margins + request * margin_request + probe[:, None] * margin_probe + concept[None, :]
    margin = tl.load(spot, inside, other=-1.0).to(tl.float32)
    known = tl.sum((~(tl.abs(margin) < float("inf"))).to(tl.int32), 1) == 0
    whole = known & (tl.load(finite + request * probes + probe, real, other=1) != 0)
    flagged = (tl.sum((margin > 0).to(tl.int32), 1) > 0) | ~whole
    flagged = flagged & real
    hits, broken = tl.sum(flagged.to(tl.int32)), tl.sum((~whole).to(tl.int32))
    blocked = (hits >= tl.load(need + request)) | (broken > 0)
    cut = probes * concepts
    block += request * (cut + 2 * probes + 2)
    if COPIED:
        tl.store(block + probe[:, None] * concepts + concept[None, :], margin, inside)
    tl.store(block + cut + probe, flagged.to(tl.float32), real)
    tl.store(block + cut + probes + probe, whole.to(tl.float32), real)
    # rounded as the definition rounds it, which `/` is not
    score = tl.div_rn(hits.to(tl.float32), probes.to(tl.float32))
    tl.store(block + cut + 2 * probes, score)
    tl.store(block + cut + 2 * probes + 1, blocked.to(tl.float32))


_MARGIN_SIZES = ("width", "probes", "concepts", "specials", "embed_request", "embed_probe")
_MARGIN_CONSTANTS = ("CONCEPTS", "SPECIALS", "BLOCK")
_VOTE_SIZES = ("probes", "concepts", "margin_request", "margin_probe")
_VOTE_CONSTANTS = ("COPIED", "PROBES", "CONCEPTS")


def _margin_variant(element: str, concepts: int) -> Variant:
    """As the engine uses it: embeddings of the checker's dtype, constants in float32."""
    chosen = setting("concept_margins")
    names = ("concept_embeds", "thresholds", "special_embeds", "special_thresholds", "block")
    kinds = {"embeds": f"*{element}"} | dict.fromkeys(names, "*fp32") | dict.fromkeys(_MARGIN_SIZES, "i32")
    return Variant(
        name=f"concept_margins_{element}_{concepts}",
        signature=kinds | dict.fromkeys(_MARGIN_CONSTANTS, "constexpr"),
        constants=dict(zip(_MARGIN_CONSTANTS, (concepts, 4, chosen.block), strict=True)),
        aligned=("embeds", "concept_embeds", "special_embeds", "width", "embed_request", "embed_probe"),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def _vote_variant(element: str, probes: int, concepts: int, *, copied: bool) -> Variant:
    chosen = setting("margin_vote")
    kinds = {"margins": f"*{element}", "finite": "*i1", "need": "*i64", "block": "*fp32"}
    return Variant(
        name=f"margin_vote_{element}_{probes}_{concepts}{'_copied' if copied else ''}",
        signature=kinds | dict.fromkeys(_VOTE_SIZES, "i32") | dict.fromkeys(_VOTE_CONSTANTS, "constexpr"),
        constants=dict(zip(_VOTE_CONSTANTS, (copied, probes, concepts), strict=True)),
        aligned=("margins", "finite", "need", "block"),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


MARGINS = Kernel(
    name="concept_margins",
    function=_concept_margins,
    variants=tuple(
        _margin_variant(element, concepts) for element in ("fp16", "bf16", "fp32") for concepts in (4, 32)
    ),
    grid="(requests * probes, 1, 1)",
)
KERNEL = Kernel(
    name="margin_vote",
    function=_margin_vote,
    variants=tuple(
        _vote_variant(element, probes, concepts, copied=copied)
        for element, copied in (("fp32", False), ("fp32", True), ("fp16", True), ("bf16", True))
        for probes in (8, 16, 32, 64)
        for concepts in (4, 32)
    ),
    grid="(requests, 1, 1)",
)


def margin_vote(margins: Tensor, finite: Tensor, need: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`fused.margin_vote`. The first two axes of margins may have any stride."""
    name = "margin_vote"
    if margins.dim() != 3:
        raise ValueError(f"{name}: margins must be (R, P, C); got {tuple(margins.shape)}")
    typed(name, {"margins": (margins, FLOATS)})
    block = _block(name, margins, finite, need, concepts=margins.shape[2], out=out)
    _vote(margins, finite, need, block, strides=row_strides(name, "margins", margins, 2), copied=True)
    return block


def concept_vote(
    image_embeds: Tensor, finite: Tensor, need: Tensor, *, concepts: Concepts, out: Tensor | None = None
) -> Tensor:
    """`fused.concept_vote`. The first two axes of image_embeds may have any stride; the constants are
    float32.
    """
    name = "concept_vote"
    if image_embeds.dim() != 3:
        raise ValueError(f"{name}: image_embeds must be (R, P, D); got {tuple(image_embeds.shape)}")
    requests, probes, width = image_embeds.shape
    count, specials = len(concepts.thresholds), len(concepts.special_thresholds)
    constants = {
        "embeds": (concepts.embeds, (count, width)),
        "thresholds": (concepts.thresholds, (count,)),
        "special_embeds": (concepts.special_embeds, (specials, width)),
        "special_thresholds": (concepts.special_thresholds, (specials,)),
    }
    shaped(name, constants)
    typed(name, {key: (value, (torch.float32,)) for key, (value, _) in constants.items()})
    typed(name, {"image_embeds": (image_embeds, FLOATS)})
    tensors = {key: value for key, (value, _) in constants.items()}
    together(name, image_embeds=image_embeds, **tensors)
    dense(name, **tensors)
    block = _block(name, image_embeds, finite, need, concepts=count, out=out)
    chosen = tuned("concept_margins", image_embeds)
    arguments: dict[str, Argument] = {
        "embeds": image_embeds,
        "concept_embeds": concepts.embeds,
        "thresholds": concepts.thresholds,
        "special_embeds": concepts.special_embeds,
        "special_thresholds": concepts.special_thresholds,
        "block": block,
    }
    sizes = (width, probes, count, specials, *row_strides(name, "image_embeds", image_embeds, 2))
    arguments |= dict(zip(_MARGIN_SIZES, sizes, strict=True))
    values = (triton.next_power_of_2(max(count, 4)), triton.next_power_of_2(max(specials, 4)), chosen.block)
    settings = dict(zip(_MARGIN_CONSTANTS, values, strict=True))
    settings |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    launch(MARGINS, (requests * probes, 1, 1), arguments, settings)
    margins = block[:, : probes * count].view(requests, probes, count)
    _vote(margins, finite, need, block, strides=(block.shape[1], count), copied=False)
    return block


def _block(
    name: str, rows: Tensor, finite: Tensor, need: Tensor, *, concepts: int, out: Tensor | None
) -> Tensor:
    """The block to write, after a look at all that goes into the vote. `rows` is (R, P, ...)."""
    requests, probes = rows.shape[:2]
    if concepts < 1 or probes < 1:
        raise ValueError(f"{name}: a vote needs a probe and a concept; got {probes} and {concepts}")
    shape = (requests, probes * (concepts + 2) + 2)
    block = torch.empty(shape, device=rows.device) if out is None else out
    shaped(
        name,
        {"finite": (finite, (requests, probes)), "need": (need, (requests,)), "out": (block, shape)},
    )
    typed(name, {"finite": (finite, (torch.bool,)), "need": (need, (torch.int64,))})
    typed(name, {"out": (block, (torch.float32,))})
    together(name, rows=rows, finite=finite, need=need, out=block)
    dense(name, finite=finite, need=need, out=block)
    return block


def _vote(
    margins: Tensor, finite: Tensor, need: Tensor, block: Tensor, *, strides: tuple[int, ...], copied: bool
) -> None:
    requests, probes, concepts = margins.shape
    chosen = tuned("margin_vote", margins)
    arguments: dict[str, Argument] = {"margins": margins, "finite": finite, "need": need}
    arguments |= {"block": block} | dict(zip(_VOTE_SIZES, (probes, concepts, *strides), strict=True))
    values = (copied, triton.next_power_of_2(max(probes, 8)), triton.next_power_of_2(max(concepts, 4)))
    constants = dict(zip(_VOTE_CONSTANTS, values, strict=True))
    constants |= {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    launch(KERNEL, (requests, 1, 1), arguments, constants)
