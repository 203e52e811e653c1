"""What the file job does not go on with: outputs of another bundle, policy or input, that another run writes
to, or that it did not write so.
"""

import csv
import json
import math
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

from safelight.cli import main
from safelight.engine.prompt_file import read_prompts
from safelight.engine.screen import error_verdict, screen_file
from safelight.engine.verdict_file import COLUMNS, VerdictFile
from safelight.errors import SafelightError

SCREENED = runpy.run_path(str(Path(__file__).with_name("screened.py")))
PROMPTS, FakeDetector, write, read, refused = (
    SCREENED[name] for name in ("PROMPTS", "FakeDetector", "write", "read", "refused")
)
MODEL = Path(__file__).resolve().parents[1] / "models/shapes/model"
OUTPUTS = pytest.mark.parametrize("target", ["out.jsonl", "out.csv", "out.parquet"])


@OUTPUTS
def test_verdicts_of_two_policies_are_not_mixed(tmp_path: Path, target: str) -> None:
    source, out = write(tmp_path / "in.jsonl", [PROMPTS[0], 3]), tmp_path / target
    screen_file(FakeDetector(), source, out, seed=4)
    assert {row["policy"] for row in read(out)} == {"probes of a fake; seed 4"}, "on the blocked row too"
    assert screen_file(FakeDetector(), source, out, seed=4).resumed == 2
    write(source, [PROMPTS[0], 3, *PROMPTS])
    refused(source, out, "'probes of a fake; seed 4', not 'probes of a fake; secret seeds'")
    refused(source, out, "'probes of a fake; seed 4', not 'probes of a fake; seed 5'", seed=5)
    refused(source, out, "'probes of a fake; seed 4', not 'steps 2; seed 4'", policy="steps 2", seed=4)


@OUTPUTS
def test_one_row_of_another_policy_refuses_the_output(tmp_path: Path, target: str) -> None:
    source, out = write(tmp_path / "in.jsonl", [3, 4]), tmp_path / target
    rows = list(read_prompts(source))
    with VerdictFile(out) as file:
        for row, policy in zip(
            rows, ("probes of a fake; secret seeds", "steps 2; secret seeds"), strict=True
        ):
            file.write((row.number, row.digest, None, policy), error_verdict("no prompt"))
    refused(source, out, "policy 'steps 2; secret seeds', not 'probes of a fake; secret seeds'")


@OUTPUTS
@pytest.mark.parametrize(
    ("now", "match"),
    [
        (["changed", *PROMPTS[1:]], r"row 1 is not the verdict on row 1 of .*in\.jsonl"),
        ([*PROMPTS[:2], "changed", *PROMPTS], "row 3 is not the verdict on row 3"),
        ([PROMPTS[1], PROMPTS[0], PROMPTS[2]], "row 1 is not the verdict"),
        (PROMPTS[:2], r"holds row 3, which .*in\.jsonl does not have"),
    ],
)
def test_rows_of_another_input_are_not_mixed(tmp_path: Path, target: str, now: list, match: str) -> None:
    source, out = write(tmp_path / "in.jsonl", PROMPTS[:3]), tmp_path / target
    screen_file(FakeDetector(), source, out)
    write(source, now)
    refused(source, out, match)


def test_what_is_refused_stays_as_it_is_to_the_last_byte(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", PROMPTS[:3]), tmp_path / "out.jsonl"
    screen_file(FakeDetector(), source, out)
    held = out.read_bytes().rstrip(b"\n")  # as some editors leave it: the last row looks torn
    out.write_bytes(held)
    refused(source, out, "policy 'probes of a fake; secret seeds'", policy="another")
    assert out.read_bytes() == held
    assert screen_file(FakeDetector(), source, out).resumed == 2 and out.read_bytes().startswith(held)


@pytest.mark.parametrize("target", ["out.jsonl", "out.csv"])
def test_wide_cells_are_read_alike_by_every_run(tmp_path: Path, target: str) -> None:
    source, out = tmp_path / "in.csv", tmp_path / target
    limit = csv.field_size_limit(131_072)  # of a new process
    try:
        source.write_text(f"data,prompt\n{'x' * 200_000},one\n{'x' * 200_000},two\n", "utf-8")
        made = screen_file(FakeDetector(), source, out)
        assert (made.rows, made.errors) == (2, 0) and screen_file(FakeDetector(), source, out).resumed == 2
    finally:
        csv.field_size_limit(limit)


def test_a_row_that_lost_its_prompt_does_not_take_the_verdict_on_a_text(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "42"}\n', "utf-8")
    assert screen_file(FakeDetector(), source, out).passed == 1
    source.write_text('{"prompt": 42}\n', "utf-8")
    refused(source, out, "row 1 is not the verdict on row 1")


def test_an_output_with_a_gap_is_refused_before_the_gap_is_filled(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", PROMPTS), tmp_path / "out.jsonl"
    screen_file(FakeDetector(), source, out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[1:]))
    write(source, [*PROMPTS[:-1], "changed"])
    refused(source, out, f"row {len(PROMPTS)} is not the verdict")
    write(source, PROMPTS)
    again = FakeDetector()
    assert screen_file(again, source, out).resumed == len(PROMPTS) - 1 and again.calls == PROMPTS[:1]


def test_an_input_that_changes_while_it_is_read_gives_no_second_row(tmp_path: Path) -> None:
    far = ["x" * 30_000] * 3  # past what is read ahead
    source, out = write(tmp_path / "in.jsonl", ["one", *far, "three"]), tmp_path / "out.jsonl"
    screen_file(FakeDetector(), source, out)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[1:]))

    def change() -> None:
        source.write_text(source.read_text().replace("three", "other"))

    with pytest.raises(SafelightError, match="row 5 is not the verdict on row 5"):
        screen_file(FakeDetector(), source, out, on_row=change)
    assert sorted(row["row"] for row in read(out)) == [1, 2, 3, 4, 5]


SPOILT = [
    {"blocked": False},
    {"reason": None},
    {"reason": "fine"},
    {"blocked": False, "reason": None},  # a score of 0.5 against 0.25
    {"blocked": False, "reason": None, "score": None},
    {"blocked": False, "reason": None, "score": 0.0, "probes": 0},
    {"blocked": False, "reason": None, "score": 0.0, "threshold": None},
    {"score": "high"},
    {"policy": ""},
    {"digest": None},
    {"row": math.inf},
    {"row": 2},
]


@pytest.mark.parametrize("target", ["out.jsonl", "out.csv"])
@pytest.mark.parametrize("change", SPOILT, ids=str)
def test_a_row_that_contradicts_itself_is_not_ours(tmp_path: Path, target: str, change: dict) -> None:
    source, out = write(tmp_path / "in.jsonl", ["a star", "a ring"]), tmp_path / target
    screen_file(FakeDetector(), source, out)
    rows = read(out)
    rows[0] |= change
    if out.suffix == ".jsonl":
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with out.open("w", newline="") as file:
            cells = [[str(row[name]) for name in COLUMNS] for row in rows]
            cells = [
                ["" if cell == "None" else cell.replace("False", "false") for cell in row] for row in cells
            ]
            csv.writer(file).writerows([COLUMNS, *cells])
    named = "a second verdict on row 2" if change == {"row": 2} else "row 1"
    refused(source, out, f"{named} was not written by this version")


def test_a_row_without_a_prompt_does_not_pass_and_deep_json_is_no_row(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", ["a ring"]), tmp_path / "out.jsonl"
    screen_file(FakeDetector(), source, out)
    row = read(out)[0]
    out.write_text(json.dumps(row | {"prompt": None}) + "\n")
    refused(source, out, "row 1 was not written by this version")
    out.write_text("[" * 100_000 + "\n")
    refused(source, out, "row 1 was not written by this version")


def test_an_output_of_before_there_was_a_policy_is_refused(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", ["a ring"]), tmp_path / "out.jsonl"
    screen_file(FakeDetector(), source, out)
    row = read(out)[0]
    del row["policy"]
    out.write_text(json.dumps(row) + "\n")
    refused(source, out, "row 1 was not written by this version")


def test_verdicts_of_two_bundles_are_not_mixed(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.txt", PROMPTS[:1]), tmp_path / "out.jsonl"
    screen_file(FakeDetector("one"), source, out)
    write(source, PROMPTS)
    with pytest.raises(SafelightError, match="bundle one"):
        screen_file(FakeDetector("two"), source, out)


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        (["--threshold", "0.125"], "threshold 0.125"),
        (["--probes", "16"], "count 16"),
        (["--angle-rad", "0.61"], "angle_rad 0.61"),
        (["--kind", "circular"], "kind circular"),
        (["--target", "both"], "target both"),
        (["--checker", "latent"], "checker latent"),
        (["--steps", "25"], "steps 25"),
        (["--seed", "4"], "seed 4"),
        pytest.param(
            ["--backend", "torch", "--model", str(MODEL)],
            "on torch cpu",
            marks=pytest.mark.skipif(not MODEL.is_dir(), reason="the weights are in the checkout alone"),
        ),
    ],
    ids=lambda value: "".join(value[:2]),
)
def test_each_option_that_decides_a_verdict_is_in_the_policy(
    screened: Path, option: list[str], shown: str
) -> None:
    source, out = screened / "p.txt", screened / "p.jsonl"
    before = out.read_bytes()
    (policy,) = {row["policy"] for row in read(out)}
    assert "on onnxruntime CPUExecutionProvider; safelight " in policy and shown not in policy
    done = CliRunner().invoke(main, ["screen", "-i", str(source), "-o", str(out), *option])
    assert done.exit_code == 2 and "choose another -o" in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("safelight: ")]
    assert repr(policy) in sentence and shown in sentence
    assert out.read_bytes() == before


def test_the_same_policy_and_a_time_limit_go_on(screened: Path) -> None:
    source, out = screened / "p.txt", screened / "p.jsonl"
    for option in ([], ["--timeout-s", "90"], ["--threads", "1"], ["--steps", "1"]):
        done = CliRunner().invoke(main, ["screen", "-i", str(source), "-o", str(out), *option])
        assert done.exit_code == 0 and "2 were done before" in done.stderr


@pytest.fixture(scope="module")
def screened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two prompts, and what the shipped bundle says of them."""
    folder = tmp_path_factory.mktemp("screened")
    (folder / "p.txt").write_text("a red circle\na blue star\n")
    done = CliRunner().invoke(main, ["screen", "-i", str(folder / "p.txt"), "-o", str(folder / "p.jsonl")])
    assert done.exit_code == 0, done.stderr
    return folder
