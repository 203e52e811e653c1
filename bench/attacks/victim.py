"""The white-box view of a system: everything that it serves with, in float32, frozen and differentiable.

Guidance is the served one: the negative branch is the empty prompt (Ho & Salimans 2022) or, where the folder
has a redirector, the dynamic branch of SafeCFG (arXiv 2412.16039, `kernels.reference.safe_branch`). Knows no
attack. It counts the denoiser's calls.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from safelight.bench.attacks.family import BACKWARD
from safelight.defenses.training_model import TrainingModel
from safelight.engine.eager import DetectorModule, load_detector
from safelight.engine.guidance import SafeCFG
from safelight.kernels.philox import Stream, normals
from safelight.kernels.reference import clip_input, guide, probe_rotate, safe_branch, scheduler_step
from safelight.kernels.resize import crop_window, resize_matrix
from safelight.schedule import Solver

ROWS = 32  # pictures decoded at a time: more do not fit the cache
ANGLE_RAD = 0.6  # the shipped bundle's calibrated probes


class Victim:
    """A system under attack. N rows, L tokens, D width; latents (N, c, h, w); pictures (N, 3, H, W) in [0,
    1].

    `calls` counts the rows that its full and one-step UNets were given, differentiated ones thrice.
    `reference` is the attacker's own copy of the undefended model, whose calls are not counted.
    """

    def __init__(
        self,
        model: TrainingModel,
        detector: DetectorModule,
        *,
        reference: TrainingModel | None = None,
        redirector: nn.Module | None = None,
        latent_checker: nn.Module | None = None,
        safe_cfg: SafeCFG | None = None,
        guidance_scale: float = 3.0,
        steps: int = 10,
        solver: Solver = "dpmpp_2m",
        angle_rad: float = ANGLE_RAD,
    ) -> None:
        """The parts; `open` reads them from folders. `safe_cfg` None is the served one, and idle without a
        redirector. Raises ValueError for a schedule without such steps, and for a static `safe_cfg`.
        """
        self.safe_cfg = SafeCFG() if safe_cfg is None else safe_cfg
        if not self.safe_cfg.dynamic:
            raise ValueError("a victim's safe_cfg must be dynamic, as it is served; got dynamic=False")
        self.model, self.detector, self.reference = model, detector, reference or model
        self.redirector, self.latent_checker = redirector, latent_checker
        self.guidance_scale, self.steps, self.solver, self.angle_rad = (
            guidance_scale,
            steps,
            solver,
            angle_rad,
        )
        self.calls = 0
        self._schedule = model.schedule
        self._table = model.schedule.plan(solver, steps)
        self._empty = model.encode([""])
        self._layer: nn.Module = model.text_encoder.get_submodule(
            next(name for name, _ in model.text_encoder.named_modules() if name.endswith("token_embedding"))
        )
        self._decoder = model.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        reference: Path | None = None,
        guidance_scale: float = 3.0,
        steps: int = 10,
        solver: Solver = "dpmpp_2m",
        angle_rad: float = ANGLE_RAD,
        guarded: bool = True,
    ) -> "Victim":
        """A model folder as it is served, with its redirector and latent checker where it has them, or, not
        `guarded`, without.

        `reference` is the folder of the undefended model, the victim itself where None. Raises BundleError.
        """
        model = TrainingModel.open(path)
        folder = model.folder
        return cls(
            model,
            load_detector(path),
            reference=None if reference is None else TrainingModel.open(reference),
            redirector=folder.load("redirector") if guarded and folder.has("redirector") else None,
            latent_checker=folder.load("latent_checker")
            if guarded and folder.has("latent_checker")
            else None,
            guidance_scale=guidance_scale,
            steps=steps,
            solver=solver,
            angle_rad=angle_rad,
        )

    @property
    def embeddings(self) -> Tensor:
        """The table of token embeddings (V, D)."""
        weight: Tensor = self._layer.weight  # type: ignore[assignment]
        return weight

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 (N, L)."""
        return self.model.ids(texts)

    def ends(self, ids: Tensor) -> Tensor:
        """Position of each prompt's end token, int64 (N,)."""
        found: Tensor = (ids == self.model.tokenizer.eos_token_id).int().argmax(1)
        return found

    def hidden(self, ids: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Prompt embeddings (N, L, D) of ids (N, L), differentiable in `tokens` (N, L, D), which take the
        place of the table's.
        """
        if tokens is None:
            with torch.no_grad():
                found: Tensor = self.model.text_encoder(ids).last_hidden_state
                return found
        handle = self._layer.register_forward_hook(lambda *_: tokens)
        try:
            found = self.model.text_encoder(ids).last_hidden_state
        finally:
            handle.remove()
        return found

    def starts(self, seeds: Sequence[int]) -> Tensor:
        """The unit normals (N, c, h, w) that a service starts from at these seeds."""
        shape = self.model.latent_shape
        size = math.prod(shape)
        rows = [normals(seed, Stream.LATENT, size, probes=[0]) for seed in seeds]
        return torch.from_numpy(np.concatenate(rows)).view(-1, *shape)

    def empty(self, count: int) -> Tensor:
        """Embeddings of the empty prompt (N, L, D)."""
        return self._empty.expand(count, -1, -1)

    def branches(self, hidden: Tensor) -> list[Tensor]:
        """Embeddings (N, L, D) of the branches that depend on the text: the redirector's answer, where there
        is one, and the prompt itself.
        """
        return [hidden] if self.redirector is None else [self.redirector(hidden), hidden]

    def count(self, rows: int, *inputs: Tensor) -> None:
        """Add calls of a UNet on `rows` rows."""
        differentiated = torch.is_grad_enabled() and any(item.requires_grad for item in inputs)
        self.calls += rows * (1 + BACKWARD * differentiated)

    def answer(self, x: Tensor, t: Tensor, hidden: Tensor) -> Tensor:
        """The full UNet's answer at timesteps t (N,) or ()."""
        self.count(len(x), x, hidden)
        return self.model.predict(self.model.unet, x, t, hidden)

    def guided(self, x: Tensor, t: Tensor, hidden: Tensor, free: Tensor | None = None) -> Tensor:
        """The served, guided answer. `free` is the answer to the empty prompt where it is known already."""
        texts = [*([self.empty(len(x))] if free is None else []), *self.branches(hidden)]
        times = torch.cat([t] * len(texts)) if t.dim() else t
        answers = list(self.answer(torch.cat([x] * len(texts)), times, torch.cat(texts)).chunk(len(texts)))
        negative = answers.pop(0) if free is None else free
        if self.redirector is not None:
            negative = self._safe(negative, answers.pop(0))
        return guide(negative, answers[0], torch.full((len(x),), self.guidance_scale))

    def _safe(self, free: Tensor, redirected: Tensor) -> Tensor:
        """SafeCFG's negative branch. Rows that agree exactly are `free`: their root has no gradient."""
        strength, limit = (
            torch.full((len(free),), value) for value in (self.safe_cfg.strength, self.safe_cfg.limit)
        )
        same = (redirected == free).flatten(1).all(1).view(-1, 1, 1, 1)
        apart = torch.where(same, free.detach() + 1, redirected)
        return torch.where(same, free, safe_branch(free, apart, strength=strength, threshold=limit)[0])

    def sample(self, hidden: Tensor, starts: Tensor, steps: int | None = None) -> Tensor:
        """Scaled latents from unit normals, by the served sampler (`steps` of it), differentiable in both."""
        table = self._table if steps is None else self._schedule.plan(self.solver, steps)
        x = starts * table.init_noise_sigma
        x0 = torch.zeros_like(x)
        for timestep, row in zip(table.timesteps, table.coefficients, strict=True):
            coefficients = torch.from_numpy(row)
            out = self.guided(coefficients[0] * x, torch.tensor(float(timestep)), hidden)
            x, x0 = scheduler_step(x, out, x0, coefficients)
        return x

    def sampler_calls(self, steps: int | None = None) -> int:
        """The denoiser's calls for one picture."""
        return (2 if self.redirector is None else 3) * (self.steps if steps is None else steps)

    def pictures(self, latents: Tensor) -> Tensor:
        """Scaled latents to pictures, differentiable."""
        scaled = latents / self.model.scaling_factor
        decoded = [self._decoder.decode(part, return_dict=False)[0] for part in torch.split(scaled, ROWS)]  # type: ignore[operator]
        return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)

    def margins(self, pictures: Tensor) -> Tensor:
        """The image checker's margins (N, C), exactly its own; gradients pass its rounding straight
        through.
        """
        detector = self.detector
        exact = clip_input(pictures.detach(), detector.size, detector.mean, detector.std)
        if pictures.requires_grad:
            soft = unrounded_input(pictures, detector.size, detector.mean, detector.std)
            exact = exact + (soft - soft.detach())
        return detector.checker.margins(detector.checker.embed(exact))

    def one_step(self, hidden: Tensor, starts: Tensor) -> Tensor:
        """Scaled latents that the one-step model draws, as the detector does."""
        step = self.detector.one_step
        self.count(len(starts), hidden, starts)
        return step.x0_z * starts + step.x0_out * self.detector.predict(step.input_scale * starts, hidden)

    def probed(self, hidden: Tensor, ids: Tensor, directions: Tensor) -> Tensor:
        """Spherical probes (N, P, L, D) of prompt embeddings along normals (N, P, L, D), begin token kept."""
        place = torch.arange(ids.shape[1])
        mask = (place >= 1) & (place <= self.ends(ids)[:, None])
        angle = torch.full(directions.shape[:2], self.angle_rad)
        idle = directions.flip(-1)  # phase 0 leaves v out; where v is zero, its norm has no gradient
        return probe_rotate(hidden, directions, idle, angle, torch.zeros_like(angle), mask)

    def latent_margins(self, latents: Tensor) -> Tensor:
        """The latent checker's margins (N, C). Raises ValueError where the folder has none."""
        if self.latent_checker is None:
            raise ValueError("the victim has no latent checker; distil one into its folder first")
        found: Tensor = self.latent_checker(latents)
        return found


def unrounded_input(pictures: Tensor, size: int, mean: Tensor, deviation: Tensor) -> Tensor:
    """`kernels.reference.clip_input` without its rounding and clipping: linear, so it has a gradient."""
    rows, columns = crop_window(pictures.shape[-2], pictures.shape[-1], size)
    vertical, horizontal = (
        torch.from_numpy(resize_matrix(edge, window.length, size=size, offset=window.offset)).to(pictures)
        for edge, window in zip(pictures.shape[-2:], (rows, columns), strict=True)
    )
    return (vertical @ pictures @ horizontal.T - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)
