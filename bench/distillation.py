"""Self-test of the distillation losses on a task of classes: `python -m safelight.bench.distillation`.

Drawn shapes at 32 px under clutter and noise, class = kind and colour; one teacher, one small student, the
same budget for cross-entropy alone, KD, DKD and AEKT. Weights and schedule are mdistiller's for CIFAR-100,
shortened in proportion; nothing is tuned for one of them. AEKT runs twice, since its summary does not say
which task comes first in its serial layer: `aekt` puts the distillation behind it, `aekt_swap` the
cross-entropy. One CSV row a run; a run that is in the file is not repeated.
"""

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from safelight.defenses.distillation import Distillation, SerialLayer
from safelight.models.shapes.scene import BACKGROUNDS, COLOURS, KINDS, Scene, Shape, render
from safelight.provenance import commit
from safelight.statistics import wilson

HEADER = ["loss", "seed", "accuracy", "hits", "total", "interval", "commit"]
LOSSES = ("ce", "kd", "dkd", "aekt", "aekt_swap")
SEEDS = (0, 1, 2)
TEACHER = "teacher"
SIZE = 32  # px
PAINTS = ("red", "yellow", "green", "blue")
CLASSES = len(KINDS) * len(PAINTS)
TRAIN, TEST = 6_000, 4_000
EPOCHS, BATCH = 24, 64
LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-4
CIFAR_EPOCHS, DROPS = 240, (150, 180, 210)  # mdistiller's; both are scaled to EPOCHS
TEACHER_WIDTHS, STUDENT_WIDTHS = (32, 64, 96), (8, 16, 24)


@dataclass(frozen=True, slots=True)
class Task:
    """Pictures float32 (N, 3, 32, 32) in [-1, 1] and their classes int64 (N,)."""

    pictures: Tensor
    classes: Tensor

    @classmethod
    def draw(cls, count: int, seed: int) -> "Task":
        """`count` pictures of one shape each, under six rectangles' clutter and noise."""
        rng = np.random.default_rng(seed)
        pictures = np.empty((count, SIZE, SIZE, 3), dtype=np.float32)
        classes = rng.integers(0, CLASSES, count)
        for at, label in enumerate(classes):
            kind, colour = KINDS[label // len(PAINTS)], PAINTS[label % len(PAINTS)]
            x, y = rng.uniform(22, 42, 2)
            shape = Shape(kind, colour, x, y, rng.uniform(13, 21), rng.uniform(-0.5, 0.5))
            tint = rng.integers(-25, 26, 3)
            background = tuple(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))]
            scene = Scene((shape,), background, (int(tint[0]), int(tint[1]), int(tint[2])))
            picture = render(scene, SIZE).astype(np.float32)
            for _ in range(6):
                top, left = rng.integers(0, SIZE - 4, 2)
                height, width = rng.integers(2, 7, 2)
                picture[top : top + height, left : left + width] = COLOURS[_any(rng, tuple(COLOURS))]
            pictures[at] = picture + rng.normal(0, 45, picture.shape)
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() / 127.5 - 1
        return cls(images.clamp(-1, 1), torch.from_numpy(classes))


def _any(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


class Classifier(nn.Module):
    """A plain convolutional classifier: a stride and `depth` convolutions for every width."""

    def __init__(self, widths: tuple[int, ...], *, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *widths), widths, strict=False):
            for at in range(depth):
                layers.append(nn.Conv2d(outputs if at else inputs, outputs, 3, 1 if at else 2, 1, bias=False))
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, 32, 32) -> logits (N, classes)."""
        logits: Tensor = self.head(self.trunk(pictures).mean((2, 3)))
        return logits


def fit(
    network: nn.Module,
    task: Task,
    loss_of: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    *,
    epochs: int,
    seed: int,
    name: str,
) -> None:
    """SGD for `epochs`; half of the pictures of a batch are mirrored.

    `loss_of(pictures, rows, mirrored, epoch)`, rows int64 (B,), mirrored bool (B,).
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    drops = [drop * epochs / CIFAR_EPOCHS for drop in DROPS]
    count = len(task.classes) // BATCH
    network.train()
    for epoch in tqdm(range(epochs), desc=name, mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.1 ** sum(epoch >= drop for drop in drops)
        order = torch.randperm(len(task.classes), generator=generator)
        for at, rows in enumerate(torch.split(order, BATCH)[:count]):
            mirrored = torch.rand(BATCH, generator=generator) < 0.5
            pictures = task.pictures[rows]
            pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
            optimizer.zero_grad()
            loss_of(pictures, rows, mirrored, epoch + at / count).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    network.eval()


@torch.no_grad()
def hits(network: nn.Module, task: Task) -> int:
    """Test pictures that are classified rightly."""
    found = torch.cat([network(part).argmax(1) for part in torch.split(task.pictures, 500)])
    return int((found == task.classes).sum())


def taught(work: Path, task: Task, test: Task, epochs: int) -> tuple[Tensor, int]:
    """The teacher's logits for every training picture and its mirror image, (N, 2, classes), and its hits;
    made once and kept in `work`.
    """
    path = work / f"teacher-{len(task.classes)}-{epochs}.safetensors"
    if not path.exists():
        torch.manual_seed(100)
        teacher = Classifier(TEACHER_WIDTHS, depth=2)

        def loss_of(pictures: Tensor, rows: Tensor, mirrored: Tensor, epoch: float) -> Tensor:
            return nn.functional.cross_entropy(teacher(pictures), task.classes[rows])

        fit(teacher, task, loss_of, epochs=epochs, seed=100, name=TEACHER)
        with torch.no_grad():
            sides = [
                torch.cat([teacher(part) for part in torch.split(pictures, 500)])
                for pictures in (task.pictures, task.pictures.flip(3))
            ]
        work.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"logits": torch.stack(sides, 1), "hits": torch.tensor(hits(teacher, test))}, partial)
        partial.replace(path)
    kept = load_file(path)
    return kept["logits"], int(kept["hits"])


def student_hits(loss: str, seed: int, task: Task, test: Task, logits: Tensor, epochs: int) -> int:
    """Train a student with one loss and count what it gets right. The seed gives its start and batches."""
    name, _, swap = loss.partition("_")
    settings = Distillation.of(name)
    settings = replace(settings, warmup_epochs=settings.warmup_epochs * epochs / CIFAR_EPOCHS)
    torch.manual_seed(seed)
    student, serial = Classifier(STUDENT_WIDTHS, depth=1), SerialLayer(CLASSES, swap=bool(swap))
    both = nn.ModuleList([student, serial]) if name == "aekt" else student

    def loss_of(pictures: Tensor, rows: Tensor, mirrored: Tensor, epoch: float) -> Tensor:
        found = student(pictures)
        classified, distilled = serial(found) if name == "aekt" else (found, found)
        teacher = logits[rows, mirrored.long()]
        return settings.losses(classified, distilled, teacher, task.classes[rows], epoch=epoch)["loss"]

    fit(both, task, loss_of, epochs=epochs, seed=seed, name=f"{loss} {seed}")
    serial.fold(student.head)
    return hits(student, test)


def read_rows(path: Path, made_at: str) -> list[list[str]]:
    """The rows of a file that were measured at this commit."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return [row for row in rows[1:] if len(row) == len(HEADER) and row[-1] == made_at]


def measure(
    out: Path, work: Path, *, train: int = TRAIN, test: int = TEST, epochs: int = EPOCHS
) -> Iterator[list[str]]:
    """Yield every row, and write each as soon as it is known; rows of another commit are measured again."""
    made_at = commit()
    rows = read_rows(out, made_at)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])
    yield from rows
    done = {(row[0], row[1]) for row in rows}
    task, held = Task.draw(train, 1), Task.draw(test, 3)
    logits, right = taught(work, task, held, epochs)
    asked = [(TEACHER, 0), *((loss, seed) for seed in SEEDS for loss in LOSSES)]
    for loss, seed in asked:
        if (loss, str(seed)) in done:
            continue
        if loss != TEACHER:
            right = student_hits(loss, seed, task, held, logits, epochs)
        low, high = wilson(right, test)
        row = [loss, str(seed), f"{right / test:.4f}", str(right), str(test), f"{low:.4f} to {high:.4f}"]
        with out.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([*row, made_at])
        yield [*row, made_at]


def summary(rows: list[list[str]]) -> str:
    """Mean accuracy of each loss, and whether AEKT >= DKD >= KD holds, in plain words."""
    means = {
        loss: mean(float(row[2]) for row in rows if row[0] == loss)
        for loss in (TEACHER, *LOSSES)
        if any(row[0] == loss for row in rows)
    }
    listed = ", ".join(f"{loss} {value:.2%}" for loss, value in means.items())
    if not set(LOSSES) <= means.keys():
        return listed
    said = [
        f"{form} >= dkd >= kd {'holds' if means[form] >= means['dkd'] >= means['kd'] else 'does not hold'}"
        for form in ("aekt", "aekt_swap")
    ]
    return f"{listed}; {', '.join(said)} over {len(SEEDS)} seeds"


def main() -> None:
    """Parse the arguments, measure and say what came out."""
    parser = argparse.ArgumentParser(prog="safelight.bench.distillation", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/distillation.csv"))
    parser.add_argument(
        "--work", type=Path, default=Path("out/distillation"), help="where the teacher is kept"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(measure(arguments.out, arguments.work))
    sys.stdout.write(summary(rows) + "\n")


if __name__ == "__main__":
    main()
