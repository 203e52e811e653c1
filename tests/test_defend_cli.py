"""`safelight defend`: what it refuses in one sentence, what it writes, and how it goes on after Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from safelight.cli import main
from safelight.defenses import METHODS
from safelight.defenses.run import recipe

UNET = "unet/diffusion_pytorch_model.safetensors"
FEW = ["--steps", "2", "--batch", "2", "--lr", "0.001", "--set", "sampler_steps=2"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["defend", *map(str, arguments)])


def refused(result: Result) -> str:
    """The one sentence of a refusal."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("safelight: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["esd", "--concept", "star"], "method must be one of"),
        (["sdd"], "Missing option '--concept'"),
        (["sdd", "--concept", ""], "none of them empty"),
        (["sdd", "--concept", "star", "--concept", "  "], "none of them empty"),
        (["sdd", "--concept", "***"], "needs a letter or a digit; got '***'"),
        (["sdd", "--concept", "star", "--concept", "Star "], "got 'Star' twice"),
        (["sdd", "--concept", "star " * 100], "tokens of a text, fewer than the concept"),
        (["sdd", "--concept", "star", "--set", "nothing=1"], "sdd has no setting 'nothing'; it has ["),
        (["sdd", "--concept", "star", "--set", "roles"], "--set takes KEY=VALUE; got 'roles'"),
        (["sdd", "--concept", "star", "--set", "roles=both"], "roles must be one of"),
        (["sdd", "--concept", "star", "--set", "ema=much"], "ema must be of type float; got 'much'"),
        (["sdd", "--concept", "star", "--set", "steps=3", "--steps", "4"], "steps is given twice"),
        (["sdd", "--concept", "star", "--steps", "0"], "0 is not in the range"),
    ],
)
def test_a_wrong_call_is_one_sentence(
    tiny_model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    found = refused(call(*arguments, "--model", tiny_model, "--out", tmp_path / "out"))
    assert message in found and list(tmp_path.iterdir()) == []


def test_a_model_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for model, message in ((tmp_path / "empty", "model_index.json"), (tmp_path / "none", "is no folder")):
        options = ("--model", model, "--concept", "star", "--out", tmp_path / "out")
        assert message in refused(call("sdd", *options))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_output_that_exists_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for out in ("out", "file"):
        options = ("--model", tiny_model, "--concept", "star", "--out", tmp_path / out)
        assert "not an empty folder; name a new one" in refused(call("sdd", *options, *FEW))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "kept.txt", "out"]


def test_the_new_folder_says_what_was_done(tiny_model: Path, tmp_path: Path) -> None:
    settings = ["--seed", "3", "--set", "prompts={concept},a red {concept}", "--set", "weight_decay=0.5"]
    concepts = ["--concept", "star", "--concept", " five pointed star "]
    result = call("sdd", "--model", tiny_model, "--out", tmp_path / "out", *concepts, *FEW, *settings)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}\n"), result.output
    assert "sdd: 100%" in result.stderr and [path.name for path in tmp_path.iterdir()] == ["out"]
    (record,) = json.loads((tmp_path / "out" / "defences.json").read_text())["defences"]
    assert (record["method"], record["concepts"]) == ("sdd", ["star", "five pointed star"])
    assert record["config"]["prompts"] == ["{concept}", "a red {concept}"]
    told = {name: record["plan"][name] for name in ("steps", "batch", "lr", "seed", "weight_decay", "ema")}
    assert told == {"steps": 2, "batch": 2, "lr": 1e-3, "seed": 3, "weight_decay": 0.5, "ema": 0.999}
    assert len((tmp_path / "out" / record["losses"]).read_text().splitlines()) == 3
    changed = [
        name
        for name, value in load_file(tiny_model / UNET).items()
        if not torch.equal(value, load_file(tmp_path / "out" / UNET)[name])
    ]
    assert all("attn2" in name for name in changed)


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(tiny_model: Path, tmp_path: Path) -> None:
    def command(out: str) -> list[str]:
        options = ["--model", str(tiny_model), "--concept", "star", "--out", str(tmp_path / out)]
        settings = ["--lr", "0.01", "--set", "sampler_steps=1", "--set", "ema=0.5", "--steps", "40"]
        return [sys.executable, "-P", "-m", "safelight", "defend", "sdd", *options, *settings]

    work = tmp_path / ".out.training"
    process = subprocess.Popen(command("out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (work / "losses.csv").exists() and len((work / "losses.csv").read_text().splitlines()) > 2:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    last = stderr.splitlines()[-1]
    assert (process.returncode, stdout) == (130, "") and "Traceback" not in stderr
    assert last == f"safelight: interrupted; the same command goes on from the checkpoint in {work}"
    assert not (tmp_path / "out").exists()
    done = len((work / "losses.csv").read_text().splitlines()) - 1
    assert 0 < done < 40

    other = subprocess.run([*command("out"), "--seed", "1"], capture_output=True, text=True, check=False)
    assert other.returncode == 2 and "was made with another seed" in other.stderr.splitlines()[-1]
    for out in ("out", "whole"):
        subprocess.run(command(out), capture_output=True, check=True)
    rows = [(tmp_path / out / "losses-1-sdd.csv").read_text() for out in ("out", "whole")]
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 41
    found, whole = (load_file(tmp_path / out / UNET) for out in ("out", "whole"))
    assert all(torch.equal(value, found[name]) for name, value in whole.items()) and not work.exists()


def test_texts_are_read_as_the_type_of_the_default() -> None:
    given = {
        "lr": "1e-3",
        "steps": "7",
        "roles": "paired",
        "ema_warmup": "True",
        "prompts": " a {concept} , ",
    }
    asked = recipe("sdd", ["star"], given)
    assert (asked.plan.lr, asked.plan.steps, asked.plan.ema_warmup) == (1e-3, 7, True)
    assert (asked.config.roles, asked.config.prompts) == ("paired", ("a {concept}",))
    assert json.loads(json.dumps(asked.record()))["plan"]["steps"] == 7
    for name, text in (("steps", "1.5"), ("ema_warmup", "yes"), ("lr", "fast")):
        with pytest.raises(ValueError, match=name):
            recipe("sdd", ["star"], {name: text})


def test_the_help_names_every_method() -> None:
    help_text = " ".join(CliRunner().invoke(main, ["defend", "--help"]).stdout.split())
    assert all(method in help_text for method in METHODS)
