"""Detection and generation on a GPU: ours as it is served against diffusers pipelines, and stage by stage
against each stage's floor: `python -P -m safelight.bench.gpu_detect`.

Full-size architectures with random weights, 512 px, 8 probes. All contenders work on the same request in the
same process, one after the other, and are compared with the eager definition in float32 there before they are
timed; each row is written as soon as it is measured. `--rehearse` does all of it at tiny sizes, on whatever
there is, and writes nothing.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safelight.bench.bare_bundle import bare_bundle
from safelight.bench.gpu_models import SEED, TinyDecoder, model_folder
from safelight.bench.gpu_peers import Peer, probes_of
from safelight.bench.gpu_rows import Gpu, write
from safelight.bench.gpu_stages import staged, waterfall
from safelight.bench.rows import Row, percentiles
from safelight.engine.bundle import Bundle
from safelight.engine.detect import Detector
from safelight.engine.eager import Probing, load_detector, load_latent_detector
from safelight.engine.graphs.backend import GraphBackend
from safelight.engine.graphs.placed import PlacedFolder, Placement
from safelight.engine.graphs.runner import Runner, open_runner
from safelight.engine.model_folder import ModelFolder
from safelight.engine.sampler import Trajectory
from safelight.engine.tokenizer import PromptTokenizer
from safelight.kernels.philox import Stream, normals
from safelight.probe import ProbeConfig

COMMAND = "python -P -m safelight.bench.gpu_detect"
RESULTS = Path("bench/results")
PROMPT = "a photograph of a lighthouse at dusk"
MARGIN = "largest |margin - margin of the eager definition, float32|"
PIXEL = "largest |pixel - pixel of the eager definition, float32|, pixels in [0, 1]"
DIFFUSERS = "largest |pixel - pixel of plain diffusers, float32|, pixels in [0, 1]"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, how often, and on what. `peak` is the edge of the matrices whose product is the
    peak.
    """

    device: str
    precision: Any
    detect: str
    generate: str
    probes: int
    steps: int
    repeats: int
    peak: int
    compile_mode: str | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks."""
        found: torch.dtype = getattr(torch, self.precision)
        return found

    def compiler(self, network: Any) -> Any:
        """What diffusers users do; a rehearsal traces the networks and leaves them to eager torch."""
        if self.compile_mode is None:
            return torch.compile(network, backend="eager")
        return torch.compile(network, mode=self.compile_mode)


GPU = Plan("cuda", "float16", "sd-turbo", "sd15", 8, 25, 30, 8192, "reduce-overhead")
REHEARSAL = Plan("cpu", "float32", "tiny-sd", "tiny-sd", 3, 2, 2, 128, None)


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that does the whole of it: its label read from what ran, and its error in the same run."""

    provider: str
    call: Callable[[], Any]
    refcheck: str
    error: float


def detection(plan: Plan, bundle: Bundle, model: Path, runner: Runner) -> Iterator[Row]:
    """Rows of one request, each as soon as it is measured: the plain peer, ours with each checker and
    decoder, and last what torch.compile works on, ours and the peer, which takes minutes to begin.
    """
    config, shape = ProbeConfig(count=plan.probes), f"{plan.detect} R1 P{plan.probes} {_size(bundle)}"
    folder, tiny = ModelFolder.open(model), TinyDecoder.open(model)
    truths = {"image": eager_answers(folder, bundle, config, runner.device, latent=False)}
    pictures = truths["image"][1]

    def peer(compiler: Any) -> Contender:
        made = Peer(model, plan.device, plan.dtype, one_step=True, compiler=compiler)
        screen = made.detect(bundle, config, PROMPT, seed=SEED)
        return Contender(made.provider, screen, PIXEL, float(np.abs(screen() - pictures).max()))

    plain = peer(None)
    times = _timed(plan, plain.call)
    limit = percentiles(times)["p50_ms"]
    yield _row(plan, "detect", plain, shape, times, limit)

    def ours(
        name: str, source: ModelFolder, checker: Any, *, compiled: bool = False, early: bool = False
    ) -> Row:
        key = "tiny" if source is tiny else checker
        if key not in truths:
            truths[key] = eager_answers(source, bundle, config, runner.device, latent=checker == "latent")
        backend = GraphBackend(bundle, source, Placement(plan.precision, compiled=compiled), runner)
        with Detector(bundle, backend, config, checker=checker, early_exit=early) as detector:
            verdict = detector.check(PROMPT, seed=SEED)
            if verdict.detail is not None:
                raise RuntimeError(f"{name} could not judge the request: {verdict.detail}")
            error = float(np.abs(np.asarray(verdict.margins) - truths[key][0][: verdict.probes]).max())
            call = detector_call(detector)
            contender = Contender(f"{verdict.backend}: {name}", call, MARGIN, error)
            return _row(plan, "detect", contender, shape, _timed(plan, call), limit)

    yield ours("latent checker", folder, "latent")
    yield ours("tiny decoder", tiny, "image")
    yield ours("full decoder", folder, "image")
    yield ours("latent checker, early exit", folder, "latent", early=True)
    contender = peer(plan.compiler)
    yield _row(plan, "detect", contender, shape, _timed(plan, contender.call), limit)
    if plan.compile_mode is not None:
        yield ours("full decoder", folder, "image", compiled=True)


def _size(bundle: Bundle) -> str:
    size = bundle.manifest.picture.size
    return f"{size}x{size}"


def detector_call(detector: Detector) -> Callable[[], Any]:
    """One check of the request."""
    return lambda: detector.check(PROMPT, seed=SEED)


def eager_answers(
    folder: ModelFolder, bundle: Bundle, config: ProbeConfig, device: torch.device, *, latent: bool
) -> tuple[Any, Any]:
    """Margins (P, C) and what the checker looked at (P, ...), by the eager definition in float32."""
    placed = PlacedFolder.place(folder, device, Placement("float32"))
    module: Probing = load_latent_detector(placed) if latent else load_detector(placed)
    module.to(device)
    width = next(
        spec.axes[-1] for spec in bundle.manifest.graphs["detector"].inputs if spec.name == "prompt_u"
    )
    drawn = probes_of(bundle, config, PROMPT, seed=SEED, width=int(width))
    parts = (drawn.ids, drawn.mask, drawn.u, drawn.v, drawn.angle, drawn.phase, drawn.latents)
    given = [torch.from_numpy(np.array(part)).to(device) for part in parts]
    with torch.inference_mode():
        found = module(*given, torch.ones(1, dtype=torch.int64, device=device))
    return found[0][0].cpu().numpy(), found[-1][0].cpu().numpy()


def generation(plan: Plan, bundle: Bundle, model: Path, runner: Runner) -> Iterator[Row]:
    """Rows of one picture, from the prompt to the finished picture; the bundle's own solver and guidance."""
    scale, schedule = bundle.manifest.guidance_scale, bundle.manifest.schedule
    trajectory = Trajectory(plan.steps, scale, schedule.solver)
    latents = bundle.manifest.picture.latents
    noise = normals(SEED, Stream.LATENT, int(np.prod(latents)), probes=[0]).reshape(1, *latents)
    folder = ModelFolder.open(model)
    tokenizer = PromptTokenizer(bundle.folder / "tokenizer", bundle.manifest.tokens)
    ids = np.stack([tokenizer.encode(text)[0] for text in ("", PROMPT)])

    def sampled(placement: Placement) -> tuple[str, Callable[[], Any]]:
        sampler = GraphBackend(bundle, folder, placement, runner).sampler()

        def call() -> Any:
            empty, hidden = np.split(sampler.encode(ids), 2)
            return sampler.decode(sampler.sample(hidden, empty, noise, trajectory))

        return sampler.device, call

    exact = Peer(model, plan.device, torch.float32, one_step=False)
    truth = exact.generate(PROMPT, noise, steps=plan.steps, guidance_scale=scale)()
    del exact
    shape = f"{plan.generate} N1 {plan.steps} steps {_size(bundle)}"

    def peer(compiler: Any) -> Contender:
        made = Peer(model, plan.device, plan.dtype, one_step=False, compiler=compiler)
        draw = made.generate(PROMPT, noise, steps=plan.steps, guidance_scale=scale)
        return Contender(made.provider, draw, DIFFUSERS, _gap(draw(), truth))

    def ours(*, compiled: bool) -> Contender:
        label, call = sampled(Placement(plan.precision, compiled=compiled))
        return Contender(label, call, DIFFUSERS, _gap(call(), truth))

    plain = peer(None)
    times = _timed(plan, plain.call)
    limit = percentiles(times)["p50_ms"]
    yield _row(plan, "generate", plain, shape, times, limit)
    made: list[Callable[[], Contender]] = [lambda: ours(compiled=False), lambda: peer(plan.compiler)]
    if plan.compile_mode is not None:
        made.append(lambda: ours(compiled=True))
    for make in made:
        contender = make()
        yield _row(plan, "generate", contender, shape, _timed(plan, contender.call), limit)


def _gap(one: Any, two: Any) -> float:
    return float(np.abs(one - two).max())


def _timed(plan: Plan, call: Callable[[], Any]) -> list[float]:
    """Milliseconds of every call but the first two."""
    times = []
    for _ in range(plan.repeats + 2):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times[2:]


def _row(plan: Plan, stage: str, item: Contender, shape: str, times: Sequence[float], plain_ms: float) -> Row:
    """A row; `x_diffusers` is against the plain pipeline of the same run."""
    found = percentiles(times)
    return Row(
        stage=stage,
        provider=item.provider,
        threads=torch.get_num_threads(),
        batch=1,
        shape=shape,
        refcheck=item.refcheck,
        refcheck_error=item.error,
        command=COMMAND,
        x_diffusers=plain_ms / found["p50_ms"],
        **found,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or rehearse."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, anywhere; nothing is written")
    parser.add_argument("--only", choices=("detect", "generate", "stages"), help="one part of it")
    parser.add_argument("--work", type=Path, help="folder for the models; kept, and used again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if not given.rehearse and not torch.cuda.is_available():
        print("safelight: no NVIDIA GPU here; do: --rehearse, which writes no figures", file=sys.stderr)
        return 2
    plan = REHEARSAL if given.rehearse else GPU
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        return _measure(plan, work, Path(scratch), given)


def _measure(plan: Plan, work: Path, scratch: Path, given: argparse.Namespace) -> int:
    """All parts asked for. Every row is kept as soon as it is there, since a step of `make gpu` may be cut
    off.
    """
    runner = open_runner(plan.device)
    torch.backends.cudnn.allow_tf32 = False  # the float32 that all are compared with is float32
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if given.only != "generate":
        model = model_folder(plan.detect, work)
        bundle = bare_bundle(model, scratch / "detect")
        if given.only != "stages":
            _keep(plan, given.out, "detect", detection(plan, bundle, model, runner))
        if given.only != "detect":
            parts = staged(
                runner, bundle, model, precision=plan.precision, probes=plan.probes, peak=plan.peak
            )
            _keep_stages(plan, given.out, parts)
    if given.only in (None, "generate"):
        model = model_folder(plan.generate, work)
        bundle = bare_bundle(model, scratch / "generate")
        _keep(plan, given.out, "generate", generation(plan, bundle, model, runner))
    if plan is REHEARSAL:
        print("rehearsal: no figures")
    return 0


def _keep(plan: Plan, out: Path, part: str, rows: Iterator[Row]) -> None:
    """Print each row as it comes and, but for a rehearsal, write those so far."""
    kept: list[Row] = []
    for row in rows:
        kept.append(row)
        print(
            f"{row.stage:9}{row.provider:72}{row.p50_ms:10.2f} ms {row.x_diffusers:6.2f} x plain diffusers   "
            f"error {row.refcheck_error:.1e}",
            flush=True,
        )
        if plan is not REHEARSAL:
            gpu = Gpu.here()
            write(out / f"{gpu.slug}-{part}.csv", gpu, kept)


def _keep_stages(plan: Plan, out: Path, parts: dict[str, list[tuple[str, float, float]]]) -> None:
    """Print every stage beside its floor and, but for a rehearsal, draw them."""
    for variant, found in parts.items():
        for name, took, floor in found:
            print(f"{variant:16}{name:16}{took:10.3f} ms   floor {floor:8.3f} ms")
    if plan is not REHEARSAL:
        gpu = Gpu.here()
        title = f"{plan.detect}, {plan.probes} probes, {gpu.gpu}"
        waterfall(parts, out / f"{gpu.slug}-waterfall.png", title)


if __name__ == "__main__":
    sys.exit(main())
