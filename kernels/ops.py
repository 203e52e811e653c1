"""The operations between the networks, each run by the body that `kernels.dispatch` chooses.

Signatures, shapes and meaning are those of `kernels.fused`, which defines them.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from safelight.kernels import fused
from safelight.kernels.dispatch import body

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


def _operation(definition: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """The definition's signature, and a body chosen by the device of its first tensor."""

    @wraps(definition)
    def run(*given: _Given.args, **named: _Given.kwargs) -> _Made:
        first = given[0] if given else next(iter(named.values()))
        made: _Made = body(definition.__name__, first)(*given, **named)  # type: ignore[arg-type]
        return made

    return run


probe_rotate = _operation(fused.probe_rotate)
probe_latents = _operation(fused.probe_latents)
guidance_step = _operation(fused.guidance_step)
latent_to_x0 = _operation(fused.latent_to_x0)
clip_input = _operation(fused.clip_input)
margin_vote = _operation(fused.margin_vote)
concept_vote = _operation(fused.concept_vote)
