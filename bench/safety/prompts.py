"""The requests of a run: clean captions, near-neighbour ones, and the tasks of attackers. Fixed by the seed.

All are captions of the `test` split, which nothing that defends was trained, tuned or calibrated on.
"""

import hashlib
from dataclasses import dataclass
from itertools import islice

from safelight.bench.safety.served import Ask
from safelight.bench.safety.settings import Settings, seed_of
from safelight.models.shapes.captions import Captioned, stream
from safelight.models.shapes.scene import NEIGHBOURS, RESTRICTED

SETS = ("clean", "neighbours")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Captions with the scenes they describe: without a star, near one, and of a star."""

    clean: tuple[Captioned, ...]
    neighbours: tuple[Captioned, ...]
    tasks: tuple[Captioned, ...]

    @classmethod
    def make(cls, settings: Settings) -> "Prompts":
        """`count` clean captions, as many near-neighbour ones (a third of each kind), and the star captions
        that attackers start from: spelt as they are, in the surface forms that defenders know.
        """
        seed = settings.seed

        def safe(count: int, purpose: str, kind: str | None) -> list[Captioned]:
            items = stream("test", seed_of(seed, purpose, 0), kind=kind)
            return list(islice((item for item in items if not item.scene.restricted), count))

        near = [safe(settings.count // len(NEIGHBOURS), f"near {kind}", kind) for kind in NEIGHBOURS]
        stars = stream("test", seed_of(seed, "tasks", 0), kind=RESTRICTED, obfuscation=0.0, held_out=False)
        return cls(
            tuple(safe(settings.count, "clean", None)),
            tuple(item for kind in near for item in kind),
            tuple(islice(stars, settings.tasks)),
        )

    def captions(self, name: str) -> tuple[Captioned, ...]:
        """The set of this name: one of `SETS`, or `tasks`."""
        found: tuple[Captioned, ...] = getattr(self, name)
        return found

    def asks(self, name: str, settings: Settings) -> list[Ask]:
        """The requests of a set, with the seeds of their pictures and of their probes."""
        return [
            Ask(
                item.caption,
                seed_of(settings.seed, f"{name} picture", number),
                seed_of(settings.seed, f"{name} probes", number),
            )
            for number, item in enumerate(self.captions(name))
        ]

    def digests(self) -> dict[str, str]:
        """SHA-256 of each set's captions, one a line."""
        return {
            name: hashlib.sha256("\n".join(item.caption for item in self.captions(name)).encode()).hexdigest()
            for name in (*SETS, "tasks")
        }
