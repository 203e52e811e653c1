"""The backend torch on a GPU, or wherever its bodies are to run over static buffers.

Stages are there for whoever asks for one graph; a detector asks for its model and a generator for its
sampler, which are few launches where stages would be many.
"""

from torch import nn

from safelight.engine.backends import Stage
from safelight.engine.bundle import Bundle
from safelight.engine.eager import load_detector, load_graph, load_latent_detector
from safelight.engine.graphs.full_model import GraphFullModel
from safelight.engine.graphs.one_launch import OneLaunchCascade, OneLaunchModel
from safelight.engine.graphs.placed import PlacedFolder, Placement
from safelight.engine.graphs.runner import Runner
from safelight.engine.graphs.sampling import GraphSampler
from safelight.engine.graphs.screening import LatentScreening, PictureScreening, Screening
from safelight.engine.graphs.stage import GraphStage, detector_kept, part_body
from safelight.engine.looks import ProbeModel
from safelight.engine.model_folder import ModelFolder
from safelight.engine.sampler import Sampler
from safelight.engine.tokenizer import PromptTokenizer
from safelight.errors import BundleError
from safelight.probe import ProbeConfig


class GraphBackend:
    """The networks of one bundle on one device, each loaded once, and what runs on them."""

    def __init__(self, bundle: Bundle, folder: ModelFolder, placement: Placement, runner: Runner) -> None:
        """`folder` is the one that the bundle was made from, `runner` of the device to run on."""
        self._bundle = bundle
        self._runner = runner
        self._placement = placement
        self._folder = PlacedFolder.place(folder, runner.device, placement)

    @property
    def label(self) -> str:
        """Where and how: device, precision, compiled or not."""
        compiled = ", compiled" if self._placement.compiled else ""
        return f"torch {self._runner.label}, {self._placement.precision}{compiled}, graph"

    def stage(self, graph: str) -> Stage:
        """See `Backend`."""
        spec = self._bundle.manifest.graphs.get(graph)
        if spec is None:
            raise BundleError(f"{self._bundle.folder} has no {graph}; export a bundle that holds it")
        if graph in ("detector", "detector_latent"):
            screening = self.screening(latent=graph == "detector_latent")
            kept = detector_kept(screening)
            return GraphStage(spec, self._runner, screening.take, label=self.label, kept=kept)
        return GraphStage(spec, self._runner, part_body(self._module(graph)), label=self.label)

    def one_step(self, config: ProbeConfig, *, latent: bool, band: float | None = None) -> ProbeModel:
        """CROPS-1 as one launch: with the image checker, with the latent one, or, where there is a `band`,
        with both in a cascade.
        """
        model = OneLaunchModel(
            self.screening(latent=latent), self._runner, self._bundle.manifest, config, label=self.label
        )
        if band is None:
            return model
        return OneLaunchCascade(model, self._pictures(), self._runner, band)

    def full_model(
        self, config: ProbeConfig, tokenizer: PromptTokenizer, *, steps: int, latent: bool
    ) -> ProbeModel:
        """CROPS, its probes and all steps in one run: with the image checker, or with the latent one."""
        return GraphFullModel(
            self,
            self._bundle.manifest,
            config,
            tokenizer,
            steps=steps,
            latent=latent,
            text_encoder=self._module("text_encoder"),
            denoiser=self._module("unet"),
            runner=self._runner,
        )

    def sampler(self) -> Sampler:
        """The full model, a step a launch."""
        return GraphSampler(self, self._bundle.manifest, self._module("unet"), self._runner)

    def screening(self, *, latent: bool) -> Screening:
        """The bodies from tokens to the result block, by the image checker or the latent one."""
        if not latent:
            return self._pictures()
        detector = load_latent_detector(self._folder).to(self._runner.device)
        return LatentScreening(detector, self._bundle.manifest)

    def _module(self, graph: str) -> nn.Module:
        return load_graph(self._folder, graph).to(self._runner.device)

    def _pictures(self) -> PictureScreening:
        detector = load_detector(self._folder).to(self._runner.device)
        return PictureScreening(detector, self._bundle.manifest)
