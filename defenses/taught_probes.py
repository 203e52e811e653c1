"""Probes as the detector makes them, with what the image checker says of each: the lessons of a latent
checker.

Captions go through text encoder, rotation and one-step UNet; decoder, preprocessing and checker are the
teacher, in the arithmetic of `engine.eager.DetectorModule`. Knows no student and no loss.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from safelight.defenses.training_model import TrainingModel
from safelight.engine.eager import DetectorModule, Preprocessing
from safelight.engine.model_folder import ONE_STEP
from safelight.errors import SafelightError
from safelight.kernels.reference import clip_input, probe_rotate
from safelight.models.shapes.captions import stream
from safelight.models.shapes.scene import NEIGHBOURS, RESTRICTED

CHUNK = 16  # probes drawn together: what fits a processor's cache


@dataclass(frozen=True, slots=True)
class TaughtProbes:
    """N probes: `latents` float32 (N, c, h, w), scaled as the UNet knows them, and the image checker's
    `margins` (N, C).
    """

    latents: Tensor
    margins: Tensor

    @property
    def flagged(self) -> Tensor:
        """Whether the image checker flags each, bool (N,)."""
        return (self.margins > 0).any(1)

    def logits(self, scale: float) -> Tensor:
        """The teacher as a classifier of C + 1 classes, (N, C + 1): [0, scale m_1, .., scale m_C].

        Class 0, "none", is the largest exactly where no margin is above 0, since ties go to the first.
        """
        return torch.cat([torch.zeros_like(self.margins[:, :1]), scale * self.margins], 1)


class ImageTeacher:
    """Draws probes of captions, and judges them with decoder and image checker."""

    def __init__(self, model: TrainingModel) -> None:
        """Takes the folder's own networks; the one-step UNet where it has one. Raises BundleError."""
        folder = model.folder
        self.model = model
        self.detector = DetectorModule(
            text_encoder=model.text_encoder,
            unet=folder.load(ONE_STEP) if folder.has_one_step else model.unet,
            vae=model.vae,
            safety_checker=folder.load("safety_checker"),
            one_step=folder.one_step(),
            preprocessing=Preprocessing.read(folder),
        ).eval()

    @property
    def concepts(self) -> int:
        """C, the concepts of the image checker."""
        return len(self.detector.checker.concept_embeds)

    @torch.no_grad()
    def draw(self, captions: Sequence[str], angle: Tensor, generator: torch.Generator) -> Tensor:
        """x0 latents (N, c, h, w) of one probe of each caption at `angle` (N,) radians, from fresh noise."""
        ids = self.model.ids(captions)
        hidden = self.model.encode(captions)
        u = torch.randn(len(captions), 1, *hidden.shape[1:], generator=generator).to(hidden)
        still = torch.zeros_like(angle)
        turned = probe_rotate(
            hidden, u, torch.zeros_like(u), angle[:, None], still[:, None], self.turning(ids)
        )[:, 0]
        noise = torch.randn(len(captions), *self.model.latent_shape, generator=generator).to(hidden)
        step = self.detector.one_step
        return step.x0_z * noise + step.x0_out * self.detector.predict(step.input_scale * noise, turned)

    def turning(self, ids: Tensor) -> Tensor:
        """The tokens that turn, bool (N, L): all behind the begin token, up to the end token that closes the
        prompt ("tokens+eos" of `engine.neighbourhood`).
        """
        tokenizer = self.model.tokenizer
        position = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(ids != tokenizer.pad_token_id, position, 0).amax(1, keepdim=True)
        end = last + int(tokenizer.pad_token_id == tokenizer.eos_token_id)
        return (position >= 1) & (position <= end)

    @torch.no_grad()
    def margins(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, c, h, w) -> the image checker's margins (N, C)."""
        detector = self.detector
        pictures = self.model.pictures(latents)
        checked = clip_input(pictures, detector.size, detector.mean, detector.std)
        return detector.checker.margins(detector.checker.embed(checked))

    def teach(
        self, captions: Sequence[str], angle: Tensor, seed: int, *, name: str = "probes"
    ) -> TaughtProbes:
        """One probe of each caption at `angle` float32 (N,) radians, judged.

        Raises SafelightError where a network answers with something that is not finite.
        """
        drawn, judged = [], []
        for at in tqdm(range(0, len(captions), CHUNK), desc=name, mininterval=1):
            some = captions[at : at + CHUNK]
            generator = torch.Generator().manual_seed((seed * 1_000_003 + at) * 257 + 11)
            latents = self.draw(some, angle[at : at + CHUNK].to(self.model.device), generator)
            drawn.append(latents.cpu())
            judged.append(self.margins(latents).cpu())
        found = TaughtProbes(torch.cat(drawn), torch.cat(judged))
        if not (torch.isfinite(found.latents).all() and torch.isfinite(found.margins).all()):
            raise SafelightError(
                f"{self.model.folder.path} answers with numbers that are not finite; it cannot be learnt from"
            )
        return found

    def kept(
        self, path: Path, captions: Sequence[str], angle: Tensor, seed: int, *, name: str
    ) -> TaughtProbes:
        """`teach`, or what it gave before where `path` holds it for the same model, captions and numbers."""
        asked = json.dumps([self.model.folder.digests(), list(captions), angle.tolist(), seed])
        key = hashlib.sha256(asked.encode()).hexdigest()
        if path.exists():
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("asked") == key:
                    return TaughtProbes(file.get_tensor("latents"), file.get_tensor("margins"))
        found = self.teach(captions, angle, seed, name=name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"latents": found.latents, "margins": found.margins}, partial, metadata={"asked": key})
        partial.replace(path)
        return found


def scattered(count: int, largest_rad: float, seed: int) -> Tensor:
    """Angles float32 (count,), uniform in [0, `largest_rad`]."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) * largest_rad


def around(requests: int, probes: int, angle_rad: float) -> Tensor:
    """Angles float32 (requests * probes,) of whole requests: the request itself, then its probes."""
    angles = torch.full((requests, probes), angle_rad)
    angles[:, 0] = 0
    return angles.flatten()


def shapes_captions(split: str, count: int, seed: int, *, restricted: float) -> list[str]:
    """Captions of the shipped model for those who defend it: no held-out surface form, many respelt.

    A share `restricted` of them asks for a star, half of the rest for one of its neighbours.
    """
    rng = np.random.default_rng((seed, 77))
    kinds: tuple[str | None, ...] = (RESTRICTED, None, *NEIGHBOURS)
    streams = {
        kind: stream(split, seed * 101 + at, kind=kind, obfuscation=0.2, held_out=False)
        for at, kind in enumerate(kinds)
    }
    return [next(streams[kind]).caption for kind in _kinds(rng, count, restricted)]


def _kinds(rng: np.random.Generator, count: int, restricted: float) -> Iterator[str | None]:
    for _ in range(count):
        if rng.random() < restricted:
            yield RESTRICTED
        else:
            yield NEIGHBOURS[int(rng.integers(len(NEIGHBOURS)))] if rng.random() < 0.5 else None
