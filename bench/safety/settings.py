"""What a run of the evaluation is told: counts, seeds, how pictures are drawn. A frozen value."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from safelight.engine.sampler import Trajectory
from safelight.schedule import SOLVERS, Solver

COUNT = 300  # clean requests; as many near-neighbour ones
TASKS = 24  # of each attack
SEEDS = 1_000_000  # attackers multiply the seed by a million twice, within 64 bits


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one run; the same for every row, so that rows may be compared.

    `count` clean prompts and as many near-neighbour ones, `tasks` per attack. Pictures take `steps` of
    `solver` at `guidance_scale`; the probes of full CROPS take `probe_steps`, at the bundle's own solver.
    `budget` scales what an attacker may spend, 1 for the attack's own default. `timed` clean requests are
    timed one by one. `stack_model` names the defended model inside the row `stack`. Raises ValueError.
    """

    seed: int = 7
    count: int = COUNT
    tasks: int = TASKS
    steps: int = 10
    solver: Solver = "dpmpp_2m"
    guidance_scale: float = 3.0
    probe_steps: int = 10
    budget: float = 1.0
    timed: int = 25
    batch: int = 16
    stack_model: str = "sdd"

    def __post_init__(self) -> None:
        for name in ("count", "tasks", "steps", "probe_steps", "timed", "batch"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        if self.count % 3:
            raise ValueError(f"count must be divisible by 3, the kinds of near neighbours; got {self.count}")
        if type(self.seed) is not int or not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed must lie in [0, {SEEDS}); got {self.seed!r}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}; got {self.solver!r}")
        if not self.budget > 0:
            raise ValueError(f"budget must be above 0; got {self.budget!r}")
        Trajectory(self.steps, self.guidance_scale, self.solver)

    @property
    def trajectory(self) -> Trajectory:
        """How every picture is drawn."""
        return Trajectory(self.steps, self.guidance_scale, self.solver)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def seed_of(seed: int, purpose: str, number: int) -> int:
    """A seed in [0, 2**63) for request `number` of a purpose: the leading bits of a SHA-256, so that no two
    purposes share one.
    """
    made = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(made[:8], "little") >> 1
