"""Screening of a request whose prompt embeddings are given, for attackers who hold the weights. Draws nothing
else.

The detector graphs begin at token ids, so here the eager definition takes their place, with the embeddings in
place of the text encoder's answer; which tokens turn is read from the text. Probes, checkers and vote are the
served ones.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from safelight.engine.backends import Backend
from safelight.engine.bundle import Bundle
from safelight.engine.cascade import Cascade
from safelight.engine.eager import load_graph
from safelight.engine.full_model import FullModel
from safelight.engine.looks import Looks
from safelight.engine.neighbourhood import Neighbourhood, Request
from safelight.engine.tally import Tally, resolve
from safelight.engine.tokenizer import open_tokenizer
from safelight.probe import ProbeConfig, ProbeKind
from safelight.verdict import Verdict

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class HiddenRequest(Request):
    """A request with its prompt embeddings, float32 (L, D)."""

    hidden: Any = None


class _Given(nn.Module):
    """A text encoder that answers what it was told, whatever it is asked."""

    answer: Tensor

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.answer)


class EagerProbes:
    """The one-step model on given embeddings, by a detector graph's eager body."""

    def __init__(self, model: Path, graph: str, bundle: Bundle, probe: ProbeConfig) -> None:
        """`graph` is `detector` or `detector_latent`. Raises BundleError."""
        self._module = load_graph(model, graph)
        self._given = self._module.text_encoder = _Given()
        tensors = bundle.manifest.graphs["text_encoder"].outputs
        width = next(int(item.axes[-1]) for item in tensors if item.name == "last_hidden_state")
        self._neighbourhood = Neighbourhood(bundle.manifest, probe, width)
        self._latent = graph == "detector_latent"

    @property
    def device(self) -> str:
        """Where it runs, and by what."""
        return "torch cpu"

    def distinct(self, request: Request, probes: int) -> int:
        """How many of the first `probes` probes differ."""
        return self._neighbourhood.distinct(request, probes)

    def look(self, requests: Sequence[Request], probes: range, *, deadline: float | None = None) -> Looks:
        """These probes of these requests, which are `HiddenRequest`s."""
        drawn = self._neighbourhood.draw(requests, probes)
        self._given.answer = torch.from_numpy(_stacked(requests))
        arrays = (drawn.ids, drawn.mask, drawn.u, drawn.v, drawn.angle, drawn.phase, drawn.latents)
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        with torch.inference_mode():
            margins, flagged, finite, _, _, made = self._module(
                *tensors, torch.ones(len(requests), dtype=torch.int64)
            )
        shown = (None, made.numpy()) if self._latent else (made.numpy(), None)
        return Looks(margins.numpy(), flagged.numpy(), finite.numpy(), *shown)

    def close(self) -> None:
        """Free the networks."""
        self._module = nn.Identity()


class FullProbes(FullModel):
    """The full model, as it serves, on given embeddings."""

    def embeddings(
        self, requests: Sequence[Request], ids: NDArray[np.int64], *, deadline: float | None
    ) -> Floats:
        """Those of the requests, which are `HiddenRequest`s."""
        return _stacked(requests)


class HiddenScreen:
    """A detector on given embeddings: every probe at once, which decides as early exit does."""

    def __init__(
        self, bundle: Bundle, model: Path, backend: Backend, probe: ProbeConfig, *, kind: str, steps: int
    ) -> None:
        """`kind` as in `System.detector`; `model` is the folder that the bundle was made from. Raises
        ValueError for token shifts, which embeddings do not have.
        """
        if probe.kind is ProbeKind.TOKEN_SHIFT:
            raise ValueError("given embeddings have no tokens to shift; probe with spherical or circular")
        self._tokenizer = open_tokenizer(bundle)
        self._probe, self._bundle = probe, bundle
        self._model: Any
        if kind == "full":
            self._model = FullProbes(backend, bundle.manifest, probe, self._tokenizer, steps=steps)
            return
        graph = "detector" if kind == "image" else "detector_latent"
        self._model = EagerProbes(model, graph, bundle, probe)
        band = bundle.manifest.checker.latent_band
        if kind == "cascade" and band is not None:
            self._model = Cascade(self._model, backend, bundle.manifest, band)

    def check(self, text: str, hidden: Floats, *, seed: int) -> Verdict:
        """The verdict on a prompt with these embeddings (L, D). Whatever goes wrong is raised."""
        start, tally = time.monotonic(), Tally(self._probe)
        ids, truncated = self._tokenizer.encode(text)
        request = HiddenRequest(ids, seed, truncated, hidden)
        tally.add(self._model.look([request], range(self._probe.count)), 0)
        while resolve(self._model, [tally], self._probe.count):  # a cascade has doubts
            pass
        return tally.verdict(
            seed=seed,
            elapsed_s=time.monotonic() - start,
            bundle=self._bundle.manifest.bundle_id,
            backend=self._model.device,
            distinct=self._model.distinct(request, tally.evaluated),
            truncated=truncated,
        )

    def close(self) -> None:
        """Free the model."""
        self._model.close()


def _stacked(requests: Sequence[Request]) -> Floats:
    """The embeddings of the requests (R, L, D)."""
    return np.stack([request.hidden for request in requests if isinstance(request, HiddenRequest)])
