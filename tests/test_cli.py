"""The command line: data on stdout, one sentence on stderr, and an exit code that tells what happened."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from safelight.cli import EXTRAS, main
from safelight.cli.screening import line as table_line
from safelight.verdict import Verdict

COMMANDS = ["screen", "generate", "export", "verify", "inspect", "synth", "calibrate", "doctor", "bench"]
COMMANDS += ["build", "data", "defend", "distill", "evaluate", "kernels", "quantize", "tune"]

# A detector that blocks what says star, times out on slow, and raises for some other words.
FAKE = """
import os, signal
import numpy as np
from safelight.errors import BackendUnavailable
from safelight.verdict import Verdict
import safelight.cli.screening
class Fake:
    closed = 0
    bundle_id = "b"
    policy = "probes of a fake"
    def check(self, prompt, *, seed=None):
        if prompt == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        if prompt == "value": raise ValueError("a value\\n  over two lines")
        if prompt == "world": raise BackendUnavailable("cuda: no device; available: onnxruntime")
        reason = "timeout" if prompt == "slow" else "concept" if "star" in prompt else None
        score = float("nan") if reason == "timeout" else 0.5 if reason else 0.0
        return Verdict(blocked=reason is not None, reason=reason, score=score, threshold=0.25, seed=seed or 1,
            margins=((-0.5, float("nan") if reason == "timeout" else 0.25),), probes=1, distinct_probes=1,
            truncated_tokens=3 if "long" in prompt else 0, timings_ms={"total": 12.25}, bundle="b")
    def check_with_images(self, prompt, *, seed=None):
        return self.check(prompt, seed=seed), np.zeros((2, 3, 4, 4), np.float32)
    def close(self):
        Fake.closed += 1
def opened(options):
    Fake.options = dict(options)
    return Fake()
safelight.cli.screening.open_detector = opened
"""


def fake(*arguments: str, cwd: Path | None = None, before: str = FAKE) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with the fake detector."""
    code = before + "\nimport sys\nfrom safelight.cli import main\nmain(sys.argv[1:], prog_name='safelight')"
    command = [sys.executable, "-P", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=cwd)


def real(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m safelight ...`"""
    command = [sys.executable, "-P", "-m", "safelight", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def one_sentence(stderr: str) -> str:
    """The message of an error; it is one line and has no traceback."""
    assert stderr.startswith("safelight: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    return stderr[len("safelight: ") : -1]


def test_importing_the_command_line_loads_no_room() -> None:
    code = "import sys, json, safelight.cli; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    modules = json.loads(done.stdout)
    rooms = [
        name
        for name in modules
        if name.startswith(("safelight.engine", "safelight.export", "safelight.bench"))
    ]
    heavy = {"torch", "onnxruntime", "onnx", "PIL", "tokenizers", "numpy", "pyarrow", "matplotlib"} & set(
        modules
    )
    assert rooms == [] and heavy == set()


def test_every_command_has_a_help_text() -> None:
    text = CliRunner().invoke(main, ["--help"]).stdout
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert sorted(main.commands) == sorted(COMMANDS)
    for name in COMMANDS:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0 and len(result.stdout.splitlines()) > 3
        assert all(item.help for item in main.commands[name].params if isinstance(item, click.Option)), name


def test_version_and_module() -> None:
    done = real("--version")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("safelight, version ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scren"], "No such command 'scren'"),
        (["screen"], "give either PROMPTs or -i FILE"),
        (["screen", "p", "-i", "f.txt"], "give either PROMPTs or -i FILE"),
        (["screen", "-i", "f.txt"], "-i and -o go together"),
        (["screen", "p", "-o", "f.csv"], "-i and -o go together"),
        (["screen", "p", "--nothing"], "No such option '--nothing'"),
        (["screen", "p", "--seed", "-1"], "-1 is not in the range"),
        (["screen", "p", "--kind", "square"], "'square' is not one of"),
        (["generate"], "Missing argument"),
        (["generate", "a", "b", "-o", "one.png"], "several images need a folder"),
        (["generate", "a", "-o", "one.jpg"], "-o one.jpg: .jpg is not written, .png is; name a .png file"),
        (["calibrate", "shapes"], "shapes is calibrated"),
        (["calibrate", "shapes", "--clean", "a.txt", "--restricted", "b.txt"], "calibrate the copy"),
        (["export", "m", "b", "--precision", "int4"], "'int4' is not one of"),
        (["bench", "nothing"], "No such command 'nothing'"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in one_sentence(result.stderr)
    assert result.stderr.rstrip().endswith("--help")


def test_no_command_prints_the_help_on_stderr() -> None:
    done = real()
    assert (done.returncode, done.stdout) == (2, "") and "Commands:" in done.stderr


def test_a_table_goes_to_stdout_and_notes_to_stderr() -> None:
    done = fake("screen", "a red circle", "a star\x1b[31m", "slow", "a long prompt")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 5
    assert lines[1].split() == ["passed", "0", "0.25", "12", "a", "red", "circle"]
    assert lines[2].startswith("blocked") and "\x1b" not in done.stdout
    assert lines[3].split()[:2] == ["blocked", "nan"]
    assert (
        len(
            {
                line.index(word)
                for line, word in zip(lines, ["prompt", "a red", "a star", "slow", "a long"], strict=True)
            }
        )
        == 1
    )
    notes = done.stderr.splitlines()
    assert len(notes) == 2 and "'slow': timeout" in notes[0] and "the last 3 tokens" in notes[1]


def test_json_is_one_object_per_prompt_with_the_fields_of_the_verdict() -> None:
    done = fake("screen", "--json", "--seed", str(2**64 - 1), "a red circle", "slow", "étoile \n star")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["prompt"] for row in rows] == ["a red circle", "slow", "étoile \n star"]
    assert all(list(row) == ["prompt", *Verdict.__dataclass_fields__] for row in rows)
    assert rows[1]["margins"] == [[-0.5, None]] and rows[1]["score"] is None and rows[0]["seed"] == 2**64 - 1
    assert "NaN" not in done.stdout


@pytest.mark.parametrize(("prompts", "code"), [(["circle"], 0), (["circle", "star"], 3), (["slow"], 3)])
def test_fail_on_block(prompts: list[str], code: int) -> None:
    assert fake("screen", "--fail-on-block", *prompts).returncode == code
    assert fake("screen", *prompts).returncode == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("value", "a value over two lines"), ("world", "cuda: no device; available: onnxruntime")],
)
def test_an_error_is_one_sentence_and_exit_code_2(prompt: str, message: str) -> None:
    done = fake("screen", "--json", "circle", prompt, "star")
    assert done.returncode == 2 and one_sentence(done.stderr) == message
    assert len(done.stdout.splitlines()) == 1


def test_a_missing_extra_is_named_with_its_command() -> None:
    for module, extra in EXTRAS.items():
        before = f"import sys; sys.modules[{module!r}] = None\nimport safelight.cli.screening\n"
        before += f"def opened(options): import {module}\nsafelight.cli.screening.open_detector = opened"
        done = fake("screen", "p", before=before)
        assert done.returncode == 2, done.stderr
        assert one_sentence(done.stderr).endswith(f"do: pip install 'safelight[{extra}]'")


def test_ctrl_c_is_130_and_keeps_the_rows_that_are_done(tmp_path: Path) -> None:
    assert fake("screen", "circle", "ctrl-c").returncode == 130
    (tmp_path / "in.txt").write_text("circle\nstar\nctrl-c\nring\n")
    done = fake("screen", "-i", "in.txt", "-o", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 130 and one_sentence(done.stderr.lstrip("\n")) == "interrupted"
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


# A command whose new folder is half written when the signal of that number comes.
PARTIAL = """
import os, pathlib, signal, click
from safelight.cli import main
from safelight.new_folder import new_folder
@main.command("write")
@click.argument("number", type=int)
def write(number):
    with new_folder(pathlib.Path("out")) as partial:
        (partial / "graph").write_text("half")
        os.kill(os.getpid(), number)
        for _ in range(10**9): pass
"""


@pytest.mark.parametrize(
    ("number", "ignored", "code", "said"),
    [
        (signal.SIGTERM, False, 143, "terminated"),
        (signal.SIGTERM, True, 143, "terminated"),
        (signal.SIGINT, False, 130, "interrupted"),
    ],
    ids=["SIGTERM", "SIGTERM where Ctrl-C is ignored", "SIGINT"],
)
def test_a_signal_leaves_nothing_half_written(
    tmp_path: Path, number: int, ignored: bool, code: int, said: str
) -> None:
    before = PARTIAL + ("signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if ignored else "")
    done = fake("write", str(int(number)), cwd=tmp_path, before=before)
    assert done.returncode == code and one_sentence(done.stderr.lstrip("\n")) == said
    assert list(tmp_path.iterdir()) == []


def test_sigterm_is_as_it_was_once_the_command_is_done() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert CliRunner().invoke(main, ["screen"]).exit_code == 2
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"),
            "a.txt: no such file or directory",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", b"a.txt"), "a.txt: no such file"),
        (
            OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"),
            "a -> b: invalid cross-device link",
        ),
        (OSError(errno.EBADF, "Bad file descriptor", 7), "bad file descriptor"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device"),
        (OSError("cannot identify the image"), "cannot identify the image"),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    def refuse(options: object) -> None:
        raise error

    monkeypatch.setattr("safelight.cli.screening.open_detector", refuse)
    result = CliRunner().invoke(main, ["screen", "circle"])
    assert result.exit_code == 2 and one_sentence(result.stderr) == said


def test_a_reader_that_stops_early_is_no_error() -> None:
    code = FAKE + "\nfrom safelight.cli import main\nmain(['screen', '--json', *(['circle'] * 5000)])"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(60)


def test_a_file_is_screened_and_summed_up(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"p": "circle"}\n{"p": 3}\n{"p": "star"}\n')
    arguments = ("screen", "-i", "in.jsonl", "-o", "out.csv", "--column", "p", "--save-probes", "probes")
    done = fake(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "in.jsonl: row 2: the prompt must be a string; got int" in done.stderr
    assert "out.csv: 3 rows: 1 passed, 2 blocked, 1 of them for an error" in done.stderr
    assert len(list((tmp_path / "probes").iterdir())) == 4
    again = fake(*arguments, "--json", "--fail-on-block", cwd=tmp_path)
    summary = json.loads(again.stdout)
    assert again.returncode == 3, "a resumed job fails for rows that were blocked before"
    assert (summary["rows"], summary["resumed"], summary["blocked"], summary["passed"]) == (3, 3, 2, 1)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    done = fake("screen", "-i", "none.txt", "-o", "out.csv", cwd=tmp_path)
    assert done.returncode == 2 and one_sentence(done.stderr) == "none.txt: no such file or directory"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["in.txt", "in.csv"])
def test_a_file_without_a_row_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    done = fake("screen", "-i", name, "-o", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert one_sentence(done.stderr) == f"{name}: holds no row; give at least one prompt"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_limit_is_shown_as_it_is() -> None:
    verdict = Verdict(True, "concept", 0.625, 0.625, 1, ((0.25,),), probes=1, timings_ms={"total": 1.0})
    assert click.unstyle(table_line("a star", verdict)).split()[1:3] == ["0.625", "0.625"]


def test_probes_are_saved_by_the_number_of_the_prompt(tmp_path: Path) -> None:
    assert fake("screen", "circle", "star", "--save-probes", "new/probes", cwd=tmp_path).returncode == 0
    names = sorted(path.name for path in (tmp_path / "new" / "probes").iterdir())
    assert names == ["000001-p00.png", "000001-p01.png", "000002-p00.png", "000002-p01.png"]


class FakeGeneration:
    """What a Generator returns: blocked by the request, by the image, or an image."""

    def __init__(self, prompt: str) -> None:
        def verdict(blocked: bool) -> Verdict:
            reason = "concept" if blocked else None
            return Verdict(blocked, reason, float(blocked), 0.25, 1, ((0.0,),), probes=1)

        self.verdict = verdict("star" in prompt)
        self.image_verdict = None if self.verdict.blocked else verdict("odd" in prompt)
        shown = self.image_verdict is not None and not self.image_verdict.blocked
        self.image = np.zeros((4, 4, 3), np.uint8) if shown else None
        self.harmfulness = None


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> dict:
    detect, generate = (
        pytest.importorskip("safelight.engine.detect"),
        pytest.importorskip("safelight.engine.generate"),
    )
    seen: dict = {}

    class Fake:
        bundle = "shapes"

        @classmethod
        def open(cls, bundle: str, **options: object) -> "Fake":
            seen[f"open {len(seen)}"] = (bundle, options)
            return cls()

        def generate(self, prompt: str, **call: object) -> FakeGeneration:
            seen["call"] = call
            return FakeGeneration(prompt)

        def close(self) -> None:
            pass

    monkeypatch.setattr(detect, "Detector", Fake)
    monkeypatch.setattr(generate, "Generator", Fake)
    return seen


def test_generate_writes_what_passes_and_names_what_does_not(generator: dict, tmp_path: Path) -> None:
    output = tmp_path / "images"
    words = ["generate", "circle", "star", "odd ring", "-o", str(output), "--seed", "5", "--solver", "euler"]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, result.stdout) == (0, f"{output / '1.png'}\n")
    assert result.stderr.splitlines() == [
        "safelight: 'star': the request is blocked: concept",
        "safelight: 'odd ring': the image is blocked: concept",
    ]
    assert generator["call"] == {"steps": 25, "solver": "euler", "seed": 5, "probe_seed": 5}
    assert CliRunner().invoke(main, [*words, "--fail-on-block"]).exit_code == 3


def test_generate_json(generator: dict, tmp_path: Path) -> None:
    output = tmp_path / "one.png"
    result = CliRunner().invoke(
        main, ["generate", "circle", "-o", str(output), "--json", "--guidance-scale", "3"]
    )
    row = json.loads(result.stdout)
    assert row["image"] == str(output) and output.exists() and row["verdict"]["blocked"] is False
    assert row["image_verdict"]["blocked"] is False and generator["call"]["guidance_scale"] == 3.0


def test_an_older_picture_is_never_taken_for_a_blocked_one(generator: dict, tmp_path: Path) -> None:
    keep = tmp_path / "keep.png"
    for prompt in ("star", "odd ring"):
        keep.write_bytes(b"older")
        assert CliRunner().invoke(main, ["generate", prompt, "-o", str(keep)]).exit_code == 0
        assert not keep.exists()
    for name in ("1.png", "2.png", "3.png", "1.txt"):
        (tmp_path / name).write_bytes(b"older")
    CliRunner().invoke(main, ["generate", "star", "circle", "-o", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.txt", "2.png", "3.png"]
    assert (tmp_path / "2.png").read_bytes() != b"older" == (tmp_path / "3.png").read_bytes()


def test_a_wrong_call_removes_no_picture(tmp_path: Path) -> None:
    keep = tmp_path / "keep.png"
    keep.write_bytes(b"older")
    words = ["generate", "star", "-o", str(keep), "--bundle", str(tmp_path / "none")]
    assert CliRunner().invoke(main, words).exit_code == 2 and keep.read_bytes() == b"older"


def test_a_picture_is_written_whole_or_not_at_all(
    generator: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    output = tmp_path / "c.png"
    result = CliRunner().invoke(main, ["generate", "circle", "-o", str(output)])
    assert result.exit_code == 2 and one_sentence(result.stderr) == f"{output}: no space left on device"
    assert list(tmp_path.iterdir()) == []
