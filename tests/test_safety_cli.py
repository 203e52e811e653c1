"""`safelight evaluate`: what it hands on, and its exit codes."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from safelight.bench.safety import evaluate as module
from safelight.bench.safety import external, table
from safelight.bench.safety.evaluate import evaluate
from safelight.bench.safety.place import Place
from safelight.bench.safety.settings import Settings
from safelight.bench.safety.system import System
from safelight.cli import main
from safelight.cli.evaluation import evaluate as command

MODEL = Path("models/shapes/model")


def called(monkeypatch, faults: list[str], *arguments: str):
    """The command's result, and what it handed to the evaluation."""
    handed: dict = {}

    def fake(models, out, settings, **named):
        handed.update(named, models=models, out=out, settings=settings)
        return faults

    monkeypatch.setattr(module, "evaluate", fake)
    return CliRunner().invoke(command, arguments, standalone_mode=False), handed


def test_names_counts_and_folders_are_handed_on(monkeypatch, tmp_path: Path) -> None:
    given = ("--models", "sdd=a/b", "--models", "c/mine", "--defences", "sdd", "--attacks", "plain")
    numbers = ("--count", "30", "--tasks", "4", "--seed", "3", "--jobs", "2", "--max-error-rate", "0.25")
    result, handed = called(monkeypatch, [], *given, *numbers, "--out", str(tmp_path))
    assert result.return_value == 0
    assert handed["models"] == {"sdd": Path("a/b"), "mine": Path("c/mine"), "base": MODEL}
    assert handed["settings"] == Settings(seed=3, count=30, tasks=4)
    assert (handed["defences"], handed["attacks"]) == (("sdd",), ("plain",))
    assert (handed["jobs"], handed["max_error_rate"]) == (2, 0.25)


def test_too_many_errors_fail_after_the_report_and_publish_nothing(monkeypatch, tmp_path: Path) -> None:
    published: list = []
    monkeypatch.setattr(table, "publish", lambda *folders: published.append(folders))
    arguments = ("--out", str(tmp_path), "--publish", str(tmp_path / "published"))
    result, _ = called(monkeypatch, ["none, plain: 1 of 2 requests gave an error"], *arguments)
    assert result.return_value == 1
    assert "1 of 2" in result.output
    assert published == []
    result, _ = called(monkeypatch, [], *arguments)
    assert result.return_value == 0
    assert published == [(tmp_path, tmp_path / "published")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--models", "sdd="), "NAME=DIR"),
        (("--prompts", "x.csv", "--defences", "sdd"), "--defences are of"),
        (("--judge", "oracle"), "oracle"),
        (("--max-error-rate", "2"), "2"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(command, ["--out", str(tmp_path), *arguments], standalone_mode=False)
    assert isinstance(result.exception, click.UsageError)
    assert said in result.exception.format_message()


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"defences": ["psychic"]}, "a row must be one of"),
        ({"defences": ["psychic"], "systems": [System("mine", MODEL)]}, "'mine'"),
        ({"defences": ["sdd"]}, "the row sdd needs --models sdd=DIR"),
        ({"max_error_rate": 1.5}, "max_error_rate"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_exported(tmp_path: Path, named: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate({"base": tmp_path / "nowhere"}, tmp_path, Settings(), **named)
    assert list(tmp_path.iterdir()) == []


def prompted(monkeypatch, *arguments: str, **environment: str) -> dict:
    """What is handed to the evaluation of prompts."""
    handed: dict = {}
    monkeypatch.setattr(
        external, "evaluate_prompts", lambda models, file, out, **named: handed.update(named, file=file) or []
    )
    given = ["--prompts", "x.csv", *arguments]
    result = CliRunner().invoke(command, given, standalone_mode=False, env=environment)
    assert result.return_value == 0
    return handed


def test_prompts_go_to_the_other_evaluation(monkeypatch, tmp_path: Path) -> None:
    arguments = ("--out", str(tmp_path), "--judge", "nudenet", "--defences", "crops1", "--count", "5")
    handed = prompted(monkeypatch, *arguments)
    assert (handed["file"], handed["judge"], handed["limit"]) == (Path("x.csv"), "nudenet", 5)
    assert handed["defences"] == ("crops1",)
    assert handed["place"] == Place()


def test_prompts_run_where_the_command_line_says(monkeypatch, tmp_path: Path) -> None:
    where = ("--backend", "torch", "--device", "cuda:1", "--precision", "bfloat16", "--compile")
    handed = prompted(
        monkeypatch,
        "--out",
        str(tmp_path),
        *where,
        "--threads",
        "3",
        "--kernels",
        "k",
        SAFELIGHT_ENGINE_KEY="e",
    )
    assert handed["place"] == Place("torch", "cuda:1", "bfloat16", True, Path("k"), 3, Path("e"))


@pytest.mark.parametrize(
    "where",
    [
        ("--backend", "torch"),
        ("--backend", "onnxruntime"),
        ("--device", "cuda"),
        ("--precision", "float16"),
        ("--compile",),
        ("--kernels", "k"),
        ("--threads", "2"),
        ("--engine-key", "e"),
    ],
)
def test_the_table_of_attacks_is_told_no_place(monkeypatch, tmp_path: Path, where: tuple[str, ...]) -> None:
    monkeypatch.setattr(module, "evaluate", lambda *given, **named: pytest.fail("it ran"))
    result = CliRunner().invoke(main, ["evaluate", "--out", str(tmp_path), *where])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"safelight: {where[0]}: with --prompts alone; ")
    assert result.stderr.count("\n") == 1


def test_a_key_in_the_environment_is_no_place_that_was_asked_for(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAFELIGHT_ENGINE_KEY", "e")
    result, handed = called(monkeypatch, [], "--out", str(tmp_path))
    assert result.return_value == 0 and handed


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (("--device", "cuda"), "device: goes with backend torch; got backend 'onnxruntime'"),
        (("--backend", "psychic"), "backend must be 'auto' or one of"),
        (("--backend", "torch", "--precision", "float16"), "name a device such as 'cuda' too"),
        (("--backend", "torch", "--device", "cuda:99"), "device 'cuda:99' was asked for"),
    ],
)
def test_a_place_that_cannot_be_had_is_one_sentence(
    tmp_path: Path, where: tuple[str, ...], said: str
) -> None:
    (tmp_path / "one.txt").write_text("a ring\n", encoding="utf-8")
    given = ["evaluate", "--out", str(tmp_path / "out"), "--prompts", str(tmp_path / "one.txt"), *where]
    result = CliRunner().invoke(main, given)
    assert (result.exit_code, result.stdout) == (2, "")
    *progress, sentence = result.stderr.splitlines()
    assert said in sentence and "Traceback" not in result.stderr
    assert all("settings" in line or "without" in line for line in progress)
