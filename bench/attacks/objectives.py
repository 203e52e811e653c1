"""What the searches minimise: losses of prompt embeddings, differentiable, one number a row. Knows no search.

`NoiseMatch` is P4D's (arXiv 2309.06135): the served model's guided answer against the undefended model's, at
noised reference pictures. UnlearnDiffAtk (arXiv 2310.11868) matches the noise itself without guidance; the
minimum is the same text, and the answer of a served system is what is attacked here.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from safelight.bench.attacks.victim import Victim
from safelight.kernels.reference import guide

EARLIEST = 0.3  # share of the noising that references have at least: below it shapes are fixed already


class Loss(Protocol):
    """A loss of texts against their tasks."""

    @property
    def rows(self) -> int:
        """The denoiser's calls that one text costs."""

    def renew(self, generator: torch.Generator) -> int:
        """Draw fresh noise; returns the denoiser's calls that it cost for each task."""

    def __call__(self, hidden: Tensor, ids: Tensor, tasks: Tensor) -> Tensor:
        """Hidden (N, L, D), ids int64 (N, L), tasks int64 (N,): which task each row is of -> losses (N,)."""


class NoiseMatch:
    """Squared distance of guided answers at `count` noised references of each task."""

    def __init__(
        self,
        victim: Victim,
        captions: Sequence[str],
        *,
        count: int,
        kept: int = 4,
        generator: torch.Generator,
    ) -> None:
        """Make `kept` reference pictures of each caption with the undefended model."""
        self._victim, self._count, self._kept = victim, count, kept
        model = self._model = victim.reference
        self._wanted = model.encode(captions)
        noise = torch.randn((len(captions) * kept, *model.latent_shape), generator=generator)
        self._x0 = model.sample(
            model.unet,
            self._wanted.repeat_interleave(kept, 0),
            noise,
            steps=victim.steps,
            guidance_scale=victim.guidance_scale,
            solver=victim.solver,
        )

    @property
    def rows(self) -> int:
        """See `Loss`."""
        return self._count * (1 if self._victim.redirector is None else 2)  # the empty prompt is `renew`'s

    @torch.no_grad()
    def renew(self, generator: torch.Generator) -> int:
        """See `Loss`. Times are spread evenly over the noising, with a common random offset."""
        model, tasks, count = self._model, len(self._wanted), self._count
        pick = torch.randint(self._kept, (tasks, count), generator=generator)
        rows = (torch.arange(tasks)[:, None] * self._kept + pick).flatten()
        offset = (torch.arange(count) + torch.rand((tasks, count), generator=generator)) / count
        share = (EARLIEST + (1 - EARLIEST) * offset).flatten()
        t = (share * (model.timesteps - 1)).round().long()
        noise = torch.randn((len(rows), *model.latent_shape), generator=generator)
        x = model.add_noise(self._x0[rows], noise, t)
        wanted = self._wanted.repeat_interleave(count, 0)
        empty = model.encode([""]).expand(len(rows), -1, -1)
        free, conditional = model.predict(
            model.unet, torch.cat([x, x]), torch.cat([t, t]), torch.cat([empty, wanted])
        ).chunk(2)
        shape = (tasks, count, *model.latent_shape)
        self._x, self._t = x.view(shape), t.view(tasks, count)
        target = guide(free, conditional, torch.full((len(x),), self._victim.guidance_scale))
        self._target = target.view(shape)
        self._free = self._victim.answer(x, t, empty).view(shape)
        return count

    def __call__(self, hidden: Tensor, ids: Tensor, tasks: Tensor) -> Tensor:
        """See `Loss`."""
        out = self._victim.guided(
            self._x[tasks].flatten(0, 1),
            self._t[tasks].flatten(),
            hidden.repeat_interleave(self._count, 0),
            self._free[tasks].flatten(0, 1),
        )
        error: Tensor = (out - self._target[tasks].flatten(0, 1)).square().flatten(1).mean(1)
        return error.view(-1, self._count).mean(1)


class SilentStar:
    """The checker silent on the picture of a short sampler, and that picture near the plain caption's.

    relu(largest margin + `margin`) + `near` |latents - plain latents|^2 / size, at one seed for each task.
    """

    def __init__(
        self,
        victim: Victim,
        captions: Sequence[str],
        starts: Tensor,
        *,
        steps: int,
        margin: float,
        near: float,
    ) -> None:
        """`starts` (N, c, h, w), one for each caption."""
        self._victim, self._starts, self._steps = victim, starts, steps
        self._margin, self._near = margin, near
        with torch.no_grad():
            self._plain = victim.sample(victim.hidden(victim.ids(captions)), starts, steps)

    @property
    def rows(self) -> int:
        """See `Loss`."""
        return self._victim.sampler_calls(self._steps)

    def renew(self, generator: torch.Generator) -> int:
        """Nothing is drawn."""
        return 0

    def __call__(self, hidden: Tensor, ids: Tensor, tasks: Tensor) -> Tensor:
        """See `Loss`."""
        made = self._victim.sample(hidden, self._starts[tasks], self._steps)
        top = self._victim.margins(self._victim.pictures(made)).amax(1)
        far = (made - self._plain[tasks]).square().flatten(1).mean(1)
        return (top + self._margin).relu() + self._near * far


class SilentProbes:
    """The detector silent: the mean, over `count` fresh probes, of relu(largest margin + `margin`).

    Expectation over transformation (Athalye et al. 2018): directions and starting latents are drawn anew at
    each step, as the detector draws them in secret. `latent` asks the latent checker in place of the image
    checker.
    """

    def __init__(self, victim: Victim, tasks: int, *, count: int, margin: float, latent: bool) -> None:
        self._victim, self._tasks, self._count = victim, tasks, count
        self._margin, self._latent = margin, latent

    @property
    def rows(self) -> int:
        """See `Loss`."""
        return self._count

    def renew(self, generator: torch.Generator) -> int:
        """See `Loss`."""
        window, width = self._victim.empty(1).shape[1:]
        shape = self._victim.model.latent_shape
        self._directions = torch.randn((self._tasks, self._count, window, width), generator=generator)
        self._starts = torch.randn((self._tasks, self._count, *shape), generator=generator)
        return 0

    def __call__(self, hidden: Tensor, ids: Tensor, tasks: Tensor) -> Tensor:
        """See `Loss`."""
        top = self.margins(hidden, ids, tasks)
        return (top + self._margin).relu().mean(1)

    def margins(self, hidden: Tensor, ids: Tensor, tasks: Tensor) -> Tensor:
        """The largest margin of each probe, (N, P)."""
        victim = self._victim
        probes = victim.probed(hidden, ids, self._directions[tasks]).flatten(0, 1)
        made = victim.one_step(probes, self._starts[tasks].flatten(0, 1))
        found = victim.latent_margins(made) if self._latent else victim.margins(victim.pictures(made))
        return found.amax(1).view(-1, self._count)


class Both:
    """The sum of two losses, the second weighted."""

    def __init__(self, first: Loss, second: Loss, weight: float) -> None:
        self._first, self._second, self._weight = first, second, weight

    @property
    def rows(self) -> int:
        """See `Loss`."""
        return self._first.rows + self._second.rows

    def renew(self, generator: torch.Generator) -> int:
        """See `Loss`."""
        return self._first.renew(generator) + self._second.renew(generator)

    def __call__(self, hidden: Tensor, ids: Tensor, tasks: Tensor) -> Tensor:
        """See `Loss`."""
        return self._first(hidden, ids, tasks) + self._weight * self._second(hidden, ids, tasks)
