"""The detector's laws: what stops a check early never changes it, and a row of a batch is the single check.

Votes, chunks and the policy, with a model that sees what it is told to; and that nothing leaks.
"""

import gc
import itertools
import math
import mmap
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safelight.engine.backends import open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import ROWS, Detector
from safelight.engine.looks import Looks
from safelight.kernels import reference
from safelight.manifest import Manifest

TOLD = runpy.run_path(str(Path(__file__).with_name("told.py")))
bundle, told = TOLD["bundle"], TOLD["told"]
Model, Graphs, probes = (TOLD[name] for name in ("Model", "Graphs", "probes"))
same, patterned, NAN = (TOLD[name] for name in ("same", "patterned", "NAN"))


# the vote


SEEN = st.lists(st.sampled_from([-0.5, -1e-9, 0.0, 1e-9, 0.5]), min_size=1, max_size=24)


@settings(max_examples=300, deadline=None)
@given(seen=SEEN, threshold=st.floats(1e-3, 1.0))
@example(seen=[0.5] * 7 + [-0.5] * 93, threshold=0.07)
@example(seen=[0.5] * 6 + [-0.5] * 94, threshold=0.07)
@example(seen=[-0.5] * 8, threshold=1.0)
@example(seen=[0.5] * 8, threshold=1.0)
@example(seen=[0.0], threshold=1.0)
def test_early_exit_never_changes_the_decision(told: Any, seen: list[float], threshold: float) -> None:
    config = probes(len(seen), threshold)
    early, whole = Model(lambda _, probe: seen[probe]), Model(lambda _, probe: seen[probe])
    one = told(early, config).check("a", seed=1)
    two = told(whole, config, early_exit=False).check("a", seed=1)
    margins = torch.tensor(seen).reshape(1, -1, 1)
    truth = reference.vote(margins, torch.ones(1, len(seen), dtype=torch.bool), torch.tensor([config.need]))
    assert one.blocked == two.blocked == bool(truth[3])
    assert two.probes == len(seen) and two.score == pytest.approx(float(truth[2]))
    assert one.margins == two.margins[: one.probes]
    # no more probes than up to the first place where a chunk ends and the vote is certain
    hits = [0, *itertools.accumulate(value > 0 for value in seen)]
    certain = [
        end
        for end in (config.need, len(seen) - config.need + 1, len(seen))
        if hits[end] >= config.need or hits[end] + len(seen) - end < config.need
    ]
    assert one.probes == early.evaluated[1] == min(certain)
    assert [at for _, part in early.calls for at in part] == list(range(one.probes))


@settings(max_examples=100, deadline=None)
@given(
    seen=st.lists(st.sampled_from([-0.5, 0.5, NAN, math.inf, -math.inf]), min_size=1, max_size=12),
    threshold=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    early_exit=st.booleans(),
)
def test_what_is_not_finite_blocks_even_where_the_vote_would_pass(
    told: Any, seen: list[float], threshold: float, early_exit: bool
) -> None:
    model = Model(lambda _, probe: seen[probe])
    verdict = told(model, probes(len(seen), threshold), early_exit=early_exit).check("a", seed=1)
    if all(math.isfinite(value) for value in seen[: verdict.probes]):
        assert verdict.reason in (None, "concept")
    else:
        assert verdict.blocked and verdict.reason == "non_finite" and verdict.detail is None
    if not early_exit:
        assert verdict.probes == len(seen)


def test_one_probe_that_is_not_finite_is_enough(told: Any) -> None:
    seen = [-0.5] * 7 + [NAN]
    verdict = told(Model(lambda _, probe: seen[probe]), probes(8, 1.0), early_exit=False).check("a")
    assert verdict.blocked and verdict.reason == "non_finite" and verdict.score == 1 / 8


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf, 0.5])
def test_a_graph_whose_own_words_are_lost_still_blocks(value: float) -> None:
    """A compiler may take NaN for impossible: then `finite` is true and `flagged` is false throughout."""
    bundle = open_bundle("shapes")
    real = open_backend("onnxruntime", bundle, threads=1)

    class Compiled:
        def stage(self, graph: str) -> Any:
            stage = real.stage(graph)

            def run(inputs: Any, **options: Any) -> Any:
                found = dict(stage.run(inputs, **options))
                found["margins"] = np.full_like(found["margins"], -0.5)
                found["margins"][..., -1, 0] = value
                return found | {
                    "finite": np.ones_like(found["finite"]),
                    "flagged": np.zeros_like(found["flagged"]),
                }

            about = {"spec": stage.spec, "device": stage.device, "lanes": 1, "close": stage.close}
            return SimpleNamespace(plan=stage.plan, run=run, **about)

    with Detector(bundle, Compiled(), probes(4, 0.25), early_exit=False) as detector:
        verdict = detector.check("a", seed=1)
    assert verdict.blocked and verdict.reason == ("concept" if value == 0.5 else "non_finite")


# batches


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    bad=st.sets(st.integers(0, 29)),
    count=st.integers(1, 80),
    threshold=st.sampled_from([0.05, 0.25, 0.5, 1.0]),
)
def test_a_row_of_a_batch_is_the_single_check(
    told: Any, seeds: list[int], bad: set[int], count: int, threshold: float
) -> None:
    model = Model(patterned)
    detector = told(model, probes(count, threshold))
    prompts = ["\ud800" if row in bad else f"prompt {row}" for row in range(len(seeds))]
    verdicts = detector.check_batch(prompts, seed=seeds)
    assert all(len(asked) * len(part) <= max(ROWS, len(part)) for asked, part in model.calls)
    assert len(verdicts) == len(prompts)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        assert same(verdicts[row], detector.check(prompt, seed=seed))
        assert (verdicts[row].reason == "error") == (row in bad)


def test_an_empty_batch_has_no_verdicts(told: Any) -> None:
    detector = told(Model(patterned), probes(4))
    assert (
        detector.check_batch([])
        == detector.check_batch([], seed=3)
        == detector.check_batch([], seed=[])
        == []
    )


def test_one_seed_serves_all_and_many_must_fit(told: Any) -> None:
    detector = told(Model(patterned), probes(4))
    assert [verdict.seed for verdict in detector.check_batch(["a", "b"], seed=7)] == [7, 7]
    assert [verdict.seed for verdict in detector.check_batch(["a", "b"], seed=[7, 2**64 - 1])] == [
        7,
        2**64 - 1,
    ]
    with pytest.raises(ValueError, match="one for each of the 2 prompts; got 3"):
        detector.check_batch(["a", "b"], seed=[1, 2, 3])
    assert detector.check("a", seed=np.int64(7)).seed == 7
    for seed in (-1, 2**64, "1", b"1", 1.5, True):
        with pytest.raises(ValueError, match=rf"seed must be a whole number in \[0, 2\*\*64\); got {seed!r}"):
            detector.check("a", seed=seed)
        with pytest.raises(ValueError, match="seed must be"):
            detector.check_batch(["a", "b"], seed=[1, seed])


def test_a_prompt_is_not_a_batch(told: Any) -> None:
    detector = told(Model(patterned), probes(4))
    for text in ("star", b"star"):
        with pytest.raises(ValueError, match="takes a list of prompts; got one text; use check"):
            detector.check_batch(text)
    with pytest.raises(ValueError, match="takes a list of prompts; got None"):
        detector.check_batch(None)


def test_a_batch_is_whatever_gives_prompts(told: Any) -> None:
    detector = told(Model(patterned), probes(4))
    listed = detector.check_batch(["a", "b"], seed=7)
    streamed = detector.check_batch((text for text in ("a", "b")), seed=7)
    assert len(streamed) == 2 and all(map(same, streamed, listed))


def test_secret_seeds_differ_and_repeat_their_verdict(told: Any) -> None:
    detector = told(Model(patterned), probes(8))
    verdicts = [detector.check("a") for _ in range(50)] + detector.check_batch(["a"] * 50)
    seeds = [verdict.seed for verdict in verdicts]
    assert len(set(seeds)) == 100 and all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) > 2**56 and len({seed >> 60 for seed in seeds}) > 4
    assert all(same(verdict, detector.check("a", seed=verdict.seed)) for verdict in verdicts)


# the policy


def test_a_policy_may_be_tightened_never_loosened(tiny_bundle: Path) -> None:
    policy = open_bundle(tiny_bundle).manifest.probe  # 2 of 8 at 0.6
    for stricter in (
        policy,
        replace(policy, count=16),
        replace(policy, threshold=0.125),
        replace(policy, kind="circular"),
    ):
        with Detector.open(tiny_bundle, probe=stricter, threads=1) as detector:
            assert detector.probe == stricter
    for looser in (
        replace(policy, count=7),
        replace(policy, threshold=0.26),
        replace(policy, count=16, threshold=0.3),
        replace(policy, angle_rad=0.0),
        replace(policy, angle_rad=1.3),
    ):
        with pytest.raises(ValueError, match="a bundle's policy may be tightened, never loosened: "):
            Detector.open(tiny_bundle, probe=looser)


@pytest.mark.parametrize(
    "named",
    [
        {"backend": "cuda"},
        {"steps": 0},
        {"steps": 5000},
        {"threads": 0},
        {"threads": "2"},
        {"timeout_s": 0},
        {"timeout_s": "5"},
        {"probe": {"count": 8}},
    ],
    ids=str,
)
def test_settings_out_of_range_are_the_callers_mistake(tiny_bundle: Path, named: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(named))):
        Detector.open(tiny_bundle, **named)


@pytest.mark.parametrize("name", [None, 3])
def test_a_bundle_is_a_name_or_a_folder(name: Any) -> None:
    with pytest.raises(ValueError, match=f"a bundle is 'shapes', a folder, or an opened Bundle; got {name}"):
        Detector.open(name)


def test_a_model_without_a_one_step_student_is_not_asked_for_one_step(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    replace(Manifest.load(other), distilled=False).write(other)
    for steps in (None, 1):
        with pytest.raises(ValueError, match="holds no one-step model"):
            Detector.open(other, steps=steps, threads=1)
    with Detector.open(other, steps=2, threads=1) as detector:
        assert detector.check("a red star", seed=1).probes > 0


@pytest.mark.parametrize(("edge", "rows"), [(8, ROWS // 2), (16, ROWS // 8), (32, 2), (64, 1), (128, 1)])
def test_a_run_takes_as_many_probes_as_its_size_allows(bundle: Bundle, edge: int, rows: int) -> None:
    picture = replace(bundle.manifest.picture, latents=(4, edge, edge))
    large = Bundle(bundle.folder, replace(bundle.manifest, picture=picture))
    detector, model = Detector(large, Graphs(bundle), probes(40), early_exit=False), Model(lambda *_: -1.0)
    detector._model = model
    assert not detector.check("a").blocked
    assert max(len(chunk) for _, chunk in model.calls) == rows and len(model.calls) == -(-40 // rows)


def test_larger_latents_run_fewer_probes_at_once(told: Any) -> None:
    model = Model(lambda _request, _probe: -1.0)
    detector = told(model, probes(8), early_exit=False)
    detector._rows = 3
    assert not detector.check("a").blocked
    assert [chunk for _, chunk in model.calls] == [range(3), range(3, 6), range(6, 8)]


class Leaky(Model):
    """A model that keeps 100 kB of every look, in pages of their own."""

    def __init__(self) -> None:
        super().__init__(patterned)
        self.kept: list[mmap.mmap] = []

    def look(self, *args: Any, **named: Any) -> Looks:
        self.kept.append(mmap.mmap(-1, 100_000))
        self.kept[-1].write(bytes(100_000))
        return super().look(*args, **named)


def growth(check: Callable[[int], Any], times: int) -> int:
    """Bytes by which the process grows over that many checks, once warm."""
    process = psutil.Process()
    for seed in range(20):
        check(seed)
    gc.collect()
    before = process.memory_info().rss
    for seed in range(times):
        check(seed)
    gc.collect()
    return process.memory_info().rss - before


def test_300_checks_do_not_grow_the_process(bundle: Bundle, told: Any) -> None:
    limit = 10 << 20
    with Detector(
        bundle, open_backend("onnxruntime", bundle, threads=1), probes(1), timeout_s=60
    ) as detector:
        grown = growth(lambda seed: detector.check(f"a red star {'o' * (seed % 8)}", seed=seed), 300)
    leaky = told(Leaky(), probes(1))
    leaked = growth(lambda seed: leaky.check("a", seed=seed), 300)
    assert grown < limit < leaked
