"""The trainer of the defences: exact resume, what changes and what does not, averages and accumulation in
closed form, refusals.
"""

import csv
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from safelight.defenses.plan import Plan, Step
from safelight.defenses.trainer import train
from safelight.errors import SafelightError

PLAN = Plan(steps=9, lr=1e-2, batch=3, checkpoint_every=4)


class Regression:
    """A small network learns a line from points that each step's generator draws."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        self.net[0].requires_grad_(False)
        self.seen: list[int] = []
        self.drawn = 0.0
        self.end = 10**9
        self.batch = 3
        self.at: dict[int, str] = {}

    trained = property(lambda self: self.net)
    finished = property(lambda self: len(self.seen) >= self.end)

    def losses(self, step: Step) -> dict[str, Tensor]:
        self.seen.append(step.number)
        what = self.at.get(step.number)
        if what == "sigint":
            os.kill(os.getpid(), signal.SIGINT)
        points = step.normal(self.batch, 2)
        self.drawn += float(points.sum())
        loss = (step.model(points)[:, 0] - points.sum(1)).square().mean()
        if step.average is not None:  # a teacher, so that the average matters to what is learnt
            loss = loss + 0.1 * (step.model(points) - step.average(points)).square().mean()
        return {"loss": loss * (torch.nan if what == "nan" else 1), "points": points.mean()}

    def state_dict(self) -> dict:
        return {"drawn": torch.tensor(self.drawn, dtype=torch.float64), "seen": list(self.seen)}

    def load_state_dict(self, state: dict) -> None:
        self.drawn, self.seen = float(state["drawn"]), list(state["seen"])

    def place(self, device: torch.device) -> None:
        pass


class Line:
    """One weight w with loss g w: its gradient is g at each pass, whatever w is."""

    def __init__(self, slopes: tuple[float, ...] = (1.0,)) -> None:
        self.net = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.net.weight, 2.0)
        self.slopes, self.passes, self.weights = slopes, 0, []
        self.batches = 1

    trained = property(lambda self: self.net)
    finished = False

    def losses(self, step: Step) -> dict[str, Tensor]:
        self.weights.append(float(self.net.weight.detach()))
        part = [self.slopes[(self.passes * self.batches + i) % len(self.slopes)] for i in range(self.batches)]
        self.passes += 1
        slope = sum(part) / len(part)
        return {"loss": step.model(torch.full((1, 1), slope)).sum()}

    state_dict = dict
    load_state_dict = place = lambda self, other: None


def weights(objective) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in objective.net.state_dict().items()}


def rows(work: Path) -> list[list[str]]:
    with (work / "losses.csv").open(newline="") as file:
        return list(csv.reader(file))


def run(work: Path, plan: Plan = PLAN, objective=None, **options) -> Regression:
    objective = objective or Regression()
    train(objective, plan, work, cpu=True, **options)
    return objective


SETTINGS = {
    "plain": {},
    "average": {"ema": 0.9},
    "average, warmed up": {"ema": 0.999, "ema_warmup": True},
    "accumulation": {"accumulation": 3},
    "warm-up and cosine": {"warmup": 4, "decay": "cosine"},
    "half precision": {"mixed_precision": "bf16"},
    "all": {"ema": 0.9, "accumulation": 2, "warmup": 3, "decay": "cosine", "mixed_precision": "bf16"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("stops", [(1,), (3, 2), (4,), (8,)])
def test_a_run_that_was_stopped_equals_one_that_was_not(tmp_path: Path, settings: dict, stops: tuple) -> None:
    plan = replace(PLAN, **settings)
    whole = run(tmp_path / "whole", plan)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", plan, stop_after=stop)
    parts = run(tmp_path / "parts", plan)
    assert parts.drawn == whole.drawn and parts.seen == whole.seen
    for name, value in weights(whole).items():
        assert torch.equal(value, parts.net.state_dict()[name]), name
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert [row[0] for row in rows(tmp_path / "parts")] == ["step", *map(str, range(plan.steps))]


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", replace(PLAN, ema=0.9))
    killed = Regression()
    killed.at = {6: "nan"}
    with pytest.raises(FloatingPointError, match="step 6"):
        run(tmp_path / "parts", replace(PLAN, ema=0.9), killed)
    assert len(rows(tmp_path / "parts")) == 1 + 6, "rows 4 and 5 lie behind the checkpoint of step 4"
    parts = run(tmp_path / "parts", replace(PLAN, ema=0.9))
    assert parts.seen == whole.seen and rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert all(
        torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True)
    )


def test_a_run_that_is_done_does_nothing_more(tmp_path: Path) -> None:
    whole = run(tmp_path, replace(PLAN, ema=0.9))
    again = run(tmp_path, replace(PLAN, ema=0.9))
    assert again.seen == list(range(9)) and len(rows(tmp_path)) == 10
    assert all(
        torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(again).values(), strict=True)
    )


def test_a_method_that_has_finished_stays_finished(tmp_path: Path) -> None:
    for _ in range(2):
        objective = Regression()
        objective.end = 5
        run(tmp_path, objective=objective)
        assert objective.seen == [0, 1, 2, 3, 4] and len(rows(tmp_path)) == 6


def test_the_seed_decides_and_passes_and_steps_differ(tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 1, 2**40):
        run(tmp_path / str(seed), replace(PLAN, seed=seed))
        drawn += [row[2] for row in rows(tmp_path / str(seed))[1:]]
    assert len(set(drawn)) == 3 * PLAN.steps
    twice = replace(PLAN, accumulation=2, steps=1)
    assert run(tmp_path / "a", twice).drawn != pytest.approx(
        2 * run(tmp_path / "b", replace(PLAN, steps=1)).drawn
    )


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_only_what_requires_a_gradient_changes(tmp_path: Path, ema: float) -> None:
    before = weights(Regression())
    after = weights(run(tmp_path, replace(PLAN, ema=ema)))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith("0.")}


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    frozen = Regression()
    frozen.net.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        run(tmp_path, objective=frozen)


def test_a_gradient_that_is_not_finite_ends_the_run_before_a_weight_changes(tmp_path: Path) -> None:
    reference = run(tmp_path / "short", replace(PLAN, steps=2))
    broken = Regression()
    broken.at = {2: "nan"}
    with pytest.raises(FloatingPointError, match="step 2"):
        run(tmp_path / "broken", objective=broken)
    for name, value in reference.net.named_parameters():
        assert torch.equal(value, broken.net.get_parameter(name)), name
    assert not (tmp_path / "broken" / "checkpoint.pt").exists() and len(rows(tmp_path / "broken")) == 3


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"plan": replace(PLAN, lr=2e-2)}, "lr"),
        ({"plan": replace(PLAN, seed=1, ema=0.5)}, "ema, seed"),
        ({"about": {"concepts": ("a", "b")}}, "concepts"),
        ({"about": {"concepts": ("a",), "more": 1}}, "more"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, other: dict, named: str) -> None:
    first = {"plan": PLAN, "about": {"concepts": ("a",)}}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, **first, stop_after=2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(SafelightError, match=rf"another {named}; go on with the same settings"):
        run(tmp_path, **(first | other))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert run(tmp_path, **first).seen == list(range(9))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"])
def test_a_broken_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SafelightError, match=r"checkpoint\.pt cannot be read"):
        run(tmp_path)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    torch.save({"made_with": Path("a")}, tmp_path / "checkpoint.pt")
    with pytest.raises(SafelightError, match=r"checkpoint\.pt cannot be read"):
        run(tmp_path)


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    whole = run(tmp_path / "whole")
    stopped = Regression()
    stopped.at = {5: "sigint"}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", objective=stopped)
    assert stopped.seen == [0, 1, 2, 3, 4, 5] and len(rows(tmp_path / "parts")) == 7
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["done"] == 6
    assert signal.getsignal(signal.SIGINT) is before
    parts = run(tmp_path / "parts")
    assert all(
        torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True)
    )


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    impatient = Regression()
    plain = impatient.losses

    def twice(step: Step) -> dict[str, Tensor]:
        if step.number == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(step)

    impatient.losses = twice
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, objective=impatient)
    assert impatient.seen == [0, 1, 2, 3, 4]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["done"] == 4


def test_ctrl_c_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    late = Regression()
    late.at = {8: "sigint"}
    assert run(tmp_path, objective=late).seen == list(range(9))


@pytest.mark.parametrize("warm", [False, True])
def test_the_average_has_its_closed_form(tmp_path: Path, warm: bool) -> None:
    """After N steps: prod(m) w_0 + sum over n of (1 - m_n) prod over later m, times w_(n+1)."""
    plan = Plan(steps=12, lr=0.05, ema=0.7, ema_warmup=warm, weight_decay=0.0)
    student = Line()
    train(student, replace(plan, ema=0.0, ema_warmup=False), tmp_path / "student", cpu=True)
    path = [*student.weights, float(student.net.weight.detach())]
    decays = [min(0.7, (1 + n) / (10 + n)) if warm else 0.7 for n in range(12)]
    expected = path[0]
    for decay, value in zip(decays, path[1:], strict=True):
        expected = decay * expected + (1 - decay) * value
    teacher = Line()
    train(teacher, plan, tmp_path / "teacher", cpu=True)
    assert float(teacher.net.weight.detach()) == pytest.approx(expected, rel=1e-5)
    assert teacher.weights == student.weights, "the average does not touch what is trained"


def test_accumulated_passes_are_one_pass_over_their_mean(tmp_path: Path, tol: dict) -> None:
    """n passes of a batch b give the step of one pass of n b, where the loss is a mean over equal parts."""
    slopes = tuple(torch.randn(24, generator=torch.Generator().manual_seed(3)).tolist())
    found = []
    for passes, batches in ((1, 6), (2, 3), (3, 2), (6, 1)):
        line = Line(slopes)
        line.batches = batches
        plan = Plan(steps=4, lr=0.1, accumulation=passes, max_norm=0.2)
        train(line, plan, tmp_path / str(passes), cpu=True)
        assert line.passes == 4 * passes
        found.append(line.net.weight.detach())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **tol[torch.float32])
    last = Line(slopes)  # what dropping all passes but the last would give
    last.slopes = tuple(slopes[at] for at in (5, 11, 17, 23))
    train(last, Plan(steps=4, lr=0.1, max_norm=0.2), tmp_path / "last", cpu=True)
    assert not torch.allclose(last.net.weight, found[0], rtol=1e-3), "or this law could not fail"


def test_the_first_step_is_adamw_in_closed_form(tmp_path: Path) -> None:
    """w - lr (wd w + sign of the gradient), each rate times its share: AdamW's first step."""
    plan = Plan(steps=1, lr=0.1, weight_decay=0.5, warmup=4)
    line = Line((3.0,))
    train(line, plan, tmp_path, cpu=True)
    assert float(line.net.weight.detach()) == pytest.approx(2.0 - 0.025 * (0.5 * 2.0 + 1.0), rel=1e-6)


def test_rates_in_closed_form() -> None:
    plan = Plan(steps=12, lr=1.0, warmup=4, decay="cosine")
    assert [plan.rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert plan.rate(4) == 1.0 and plan.rate(8) == pytest.approx(0.5) and plan.rate(12) == pytest.approx(0.0)
    assert {replace(plan, decay="constant").rate(step) for step in range(4, 12)} == {1.0}


def test_half_precision_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    """And one process may train in several precisions, one after another."""
    for precision in ("bf16", "no", "bf16"):
        objective = run(tmp_path / f"{precision}", replace(PLAN, mixed_precision=precision))
        assert all(value.dtype == torch.float32 for value in objective.net.parameters())
        assert objective.net[3](torch.ones(1, 4)).dtype == torch.float32
        with torch.no_grad():
            points = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
            direct = points
            for layer in objective.net:
                direct = layer(direct)
            assert torch.equal(objective.net(points), direct), "the call is float32 again"


def test_a_loss_that_comes_late_is_refused_and_one_that_goes_is_nan(tmp_path: Path) -> None:
    class Two(Line):
        def losses(self, step: Step) -> dict[str, Tensor]:
            found = super().losses(step)
            if step.number in self.extra:
                found["extra"] = found["loss"].detach() * 0 + 7
            return found

    early, late = Two(), Two()
    early.extra, late.extra = {0, 1}, {2}
    train(early, Plan(steps=4, lr=0.1), tmp_path / "early", cpu=True)
    assert [row[2] for row in rows(tmp_path / "early")] == ["extra", "7", "7", "nan", "nan"]
    with pytest.raises(ValueError, match="step 2 has a loss 'extra'"):
        train(late, Plan(steps=4, lr=0.1), tmp_path / "late", cpu=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", True),
        ("batch", 1.0),
        ("accumulation", 0),
        ("warmup", -1),
        ("seed", -1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("ema", 1.0),
        ("weight_decay", -1e-9),
        ("max_norm", 0.0),
        ("decay", "linear"),
        ("mixed_precision", "int8"),
    ],
)
def test_a_plan_out_of_range_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        replace(PLAN, **{name: value})


def test_what_the_main_process_writes_no_other_touches(tmp_path: Path, monkeypatch) -> None:
    """Whoever cut the losses while it reads their header would leave it none."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_after=3)
    with (tmp_path / "losses.csv").open("a") as file:
        file.write("3,0.5,0.5\n")  # of a step that the checkpoint does not hold
    held = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "is_main_process", property(lambda self: False))
        run(tmp_path)
    assert held == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    run(tmp_path)
    assert [row[0] for row in rows(tmp_path)] == ["step", *map(str, range(PLAN.steps))]


TWO = """
import os, runpy, signal, sys
from pathlib import Path
import torch
toys = runpy.run_path(sys.argv[1])
objective, interrupted = toys["Regression"](), len(sys.argv) > 3
if interrupted and os.environ["RANK"] == "1":
    objective.at = {4: "sigint"}
try:
    toys["run"](Path(sys.argv[2]), objective=objective)
except KeyboardInterrupt:
    print("stopped after", objective.seen[-1])
torch.save(toys["weights"](objective), Path(sys.argv[2]) / f"weights-{os.environ['RANK']}.pt")
"""


def two_processes(work: Path, port: int, *words: str) -> list[str]:
    work.mkdir(exist_ok=True)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    made = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", TWO, __file__, str(work), *words],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in made]
    finally:
        for process in made:
            process.kill()
    assert [process.returncode for process in made] == [0, 0]
    return said


def test_of_two_processes_none_goes_on_alone(tmp_path: Path) -> None:
    """One is interrupted; both stop behind the same step, and together they end as if nothing had been."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert two_processes(whole, port) == ["", ""]
    assert two_processes(parts, port, "interrupted") == ["stopped after 4\n"] * 2
    assert two_processes(parts, port) == ["", ""]
    kept = [torch.load(work / f"weights-{rank}.pt") for work in (whole, parts) for rank in (0, 1)]
    for other in kept[1:]:
        assert all(
            torch.equal(value, other[name]) for name, value in kept[0].items() if "running" not in name
        )
