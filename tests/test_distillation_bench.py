"""The self-test of distillation: resumable rows, paired runs, and a summary that admits a missed order."""

import csv

import pytest
import torch

from safelight.bench import distillation
from safelight.bench.distillation import HEADER, LOSSES, SEEDS, Task, measure, student_hits, summary, taught

TINY = {"train": 128, "test": 40, "epochs": 1}


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_run_that_is_in_the_file_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "commit", lambda: "abc")
    out, work = tmp_path / "rows.csv", tmp_path / "work"
    whole = list(measure(out, work, **TINY))
    assert rows_of(out) == [HEADER, *whole] and len(whole) == 1 + len(LOSSES) * len(SEEDS)
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:6] + lines[7:]) + "\n")
    seen = []

    def once(loss, seed, *others):
        seen.append((loss, str(seed)))
        return student_hits(loss, seed, *others)

    monkeypatch.setattr(distillation, "student_hits", once)
    again = list(measure(out, work, **TINY))
    assert seen == [tuple(whole[5][:2])] and sorted(again) == sorted(whole)
    monkeypatch.setattr(distillation, "commit", lambda: "def")
    assert next(measure(out, work, **TINY))[-1] == "def", "rows of another commit are measured again"
    assert rows_of(out)[1][-1] == "def"


def test_a_run_depends_on_its_seed_and_loss_alone(tmp_path):
    task, test = Task.draw(192, 1), Task.draw(60, 2)
    logits, _ = taught(tmp_path, task, test, 1)
    one = student_hits("aekt", 1, task, test, logits, 2)
    torch.rand(3)
    assert student_hits("aekt", 1, task, test, logits, 2) == one


@pytest.mark.parametrize("kd, dkd, aekt, holds", [(0.5, 0.6, 0.7, True), (0.5, 0.7, 0.6, False)])
def test_the_summary_says_of_each_place_whether_the_order_holds(kd, dkd, aekt, holds):
    means = {"ce": 0.4, "kd": kd, "dkd": dkd, "aekt": aekt, "aekt_swap": 0.65}
    rows = [[loss, str(seed), str(mean), "", "", "", ""] for loss, mean in means.items() for seed in SEEDS]
    said = summary(rows)
    assert (f"aekt >= dkd >= kd {'holds' if holds else 'does not hold'}") in said
    assert (f"aekt_swap >= dkd >= kd {'holds' if dkd <= 0.65 else 'does not hold'}") in said
    assert f"aekt {aekt:.2%}" in said
