"""CROPS with probes that are drawn and turned on the device: they, and all steps, are one run of one program.

Only ids, masks, seeds and one angle a request go to the device, and the last latents come back; decoder and
checker are stages. Counts no vote.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safelight.engine.backends import Backend
from safelight.engine.full_model import FullModel
from safelight.engine.graphs.probes import DeviceProbes, probe_values, rows_of
from safelight.engine.graphs.program import Plans, Program
from safelight.engine.graphs.runner import Runner
from safelight.engine.graphs.sampling import Start, Steps
from safelight.engine.graphs.slab import bucket
from safelight.engine.neighbourhood import Request
from safelight.engine.sampler import Floats
from safelight.engine.tokenizer import PromptTokenizer
from safelight.manifest import Manifest
from safelight.probe import ProbeConfig


class GraphFullModel(FullModel):
    """The full model on one device. Whoever shares it takes turns, as a detector does."""

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        config: ProbeConfig,
        tokenizer: PromptTokenizer,
        *,
        steps: int,
        latent: bool,
        text_encoder: nn.Module,
        denoiser: nn.Module,
        runner: Runner,
    ) -> None:
        """`text_encoder` and `denoiser` are those of the backend, on the device of `runner`."""
        super().__init__(backend, manifest, config, tokenizer, steps=steps, latent=latent)
        self._text_encoder = text_encoder
        self._walk = Steps(denoiser, manifest, self._sampler.text)
        self._table = manifest.schedule.plan(self._trajectory.solver, self._trajectory.steps)
        self._probes = DeviceProbes(manifest)
        self._runner = runner
        self._negative = self._free if self._trajectory.guided else self._free[:0]
        self._rows = max(1, rows_of(manifest) // (1 + len(self._negative)))
        self._plans = Plans(self._program)

    @property
    def rows(self) -> int | None:
        """See `ProbeModel`: a probe is a row of the UNet for each branch of guidance."""
        return self._rows

    def latents(self, requests: Sequence[Request], probes: range, *, deadline: float | None) -> Floats:
        """See `FullModel`."""
        drawn = probe_values(self._neighbourhood, requests, probes)
        rows, columns = len(drawn["seeds"]), len(drawn["numbers"])
        lengths = bucket(rows), bucket(columns)
        program, result = self._plans.of(*lengths)
        values: dict[str, Any] = {
            **drawn,
            **self._walk.values(self._table, math.prod(lengths), self._trajectory),
            "free": self._negative,
        }
        program.run(values, result, repeats=(1, 1, self._trajectory.steps, 1), deadline=deadline)
        made = result.arrays()["made"]
        found: Floats = made.reshape(*lengths, *made.shape[1:])[:rows, :columns]
        return np.array(found.reshape(-1, *made.shape[1:]), copy=True)

    def _program(self, requests: int, probes: int) -> Program:
        start = Start(
            {**self._probes.inputs(requests, probes), "free": (torch.float32, self._negative.shape)},
            {"whole": (torch.bool, (requests, probes))},
            self._draw,
        )
        return self._walk.program(self._runner, requests * probes, 1 + len(self._negative), start)

    def _draw(self, given: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> None:
        """The embeddings of all branches and the starting latents; NaN where a probe is not finite."""
        whole, texts = made["whole"], made["texts"]
        hidden, _ = self._text_encoder(given["input_ids"])
        turned, latents = self._probes.draw(hidden, given, whole, self._neighbourhood.config)
        own = texts[-1].view(turned.shape)
        own.copy_(turned).masked_fill_(~whole[..., None, None], math.nan)
        texts[:-1].copy_(given["free"][:, None])
        made["latents"].view(latents.shape).copy_(latents)

    def close(self) -> None:
        """Free the stages and the programs."""
        super().close()
        self._plans.clear()
