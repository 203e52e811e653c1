"""`auto` takes what was measured here and now, or says why it does not; by rule it takes float32 alone.

`tune` excludes who judges otherwise.
"""

import json
import shutil
import sys
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.testing import CliRunner

from safelight.cli import main
from safelight.engine import auto
from safelight.engine.auto import Choice, choose
from safelight.engine.backends import lanes_of, open_backend
from safelight.engine.bundle import Bundle, open_bundle
from safelight.engine.detect import Detector
from safelight.engine.tune import CANDIDATES, compare, tune
from safelight.engine.tuned import Trial, Tuned, read_tuned, this_machine, tuned_path, versions, write_tuned
from safelight.errors import BackendUnavailable, BundleError
from safelight.manifest import Manifest
from safelight.models.shapes import BUNDLE_FOLDER

PROMPTS = ("a red circle", "a yellow star")
HERE = this_machine(open_bundle("shapes"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(shutil.copytree(BUNDLE_FOLDER, tmp_path / "mine"))


def measured(opened: Bundle, **changes: object) -> Tuned:
    trial = Trial(str(changes.get("winner", "openvino:bf16")), "", 1.0, 2, 0, 16, 0, 1e-3)
    about = (opened.manifest.bundle_id, this_machine(opened), versions(), "onnxruntime", (trial,))
    return replace(Tuned(trial.backend, *about), **changes)


def test_what_was_measured_is_taken_by_every_way_to_open(bundle: Bundle) -> None:
    write_tuned(measured(bundle, winner="openvino"), tuned_path(bundle))
    assert choose(bundle).backend == "openvino" and "measured in" in choose(bundle).why
    with Detector.open(bundle, backend="auto", threads=1) as detector:
        assert detector.check("a red circle", seed=1).backend == "openvino CPU f32"


def test_the_file_lies_beside_the_bundle_which_stays_whole(bundle: Bundle) -> None:
    path = tuned_path(bundle)
    write_tuned(measured(bundle), path)
    assert path == bundle.folder.resolve().parent / "mine.tuned.json"
    assert Manifest.load(bundle.folder) == bundle.manifest
    assert read_tuned(path) == measured(bundle)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bundle": "0" * 16}, "the bundle is .*, measured was 0000"),
        ({"machine": {**HERE, "the processor": "Z80"}}, "the processor is .*, measured was Z80"),
        ({"machine": {**HERE, "its instructions": ["mmx"]}}, "its instructions is"),
        ({"machine": {**HERE, "the number of cores": 4096}}, "the number of cores is .* was 4096"),
        ({"machine": {**HERE, "the GPU": ["H100"]}}, "the GPU is"),
        ({"versions": {**versions(), "openvino": "2001.1"}}, "openvino is .*, measured was 2001.1"),
        ({"versions": {**versions(), "tensorrt": "1.0"}}, "tensorrt is not there, measured was 1.0"),
        ({"versions": {}}, "safelight is .*, measured was not there"),
    ],
)
def test_what_is_stale_is_ignored_and_one_line_says_why(bundle: Bundle, changes: dict, named: str) -> None:
    write_tuned(measured(bundle, **changes), tuned_path(bundle))
    with pytest.warns(
        RuntimeWarning, match=rf"mine.tuned.json is ignored: {named}.*do: safelight tune"
    ) as said:
        choice = choose(bundle)
    assert choice.backend == "onnxruntime" and len(said) == 1 and "\n" not in choice.ignored


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values | {"winner": "os.system"},
        lambda values: values | {"winner": None},
        lambda values: values | {"winner": "onnxruntime"},  # of which there is no trial
        lambda values: values | {"trials": []},
        lambda values: values | {"trials": [values["trials"][0] | {"excluded": "1 of 2 verdicts"}]},
        lambda values: values | {"trials": [values["trials"][0] | {"verdicts_differ": 1}]},
        lambda values: values | {"trials": [values["trials"][0] | {"p50_ms": None}]},
        lambda values: values | {"safelight_tuned": 2},
        lambda values: values | {"more": 1},
        lambda values: {},
    ],
)
def test_what_is_no_result_is_ignored(bundle: Bundle, change) -> None:
    path = tuned_path(bundle)
    write_tuned(measured(bundle), path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BundleError, match="is no result of `safelight tune`"):
        read_tuned(path)
    with pytest.warns(RuntimeWarning, match="is ignored: .*delete it"):
        assert choose(bundle).backend == "onnxruntime"


def test_the_rule_takes_float32_and_says_why(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = replace(bundle.manifest.picture, latents=(4, 64, 64))
    large = Bundle(bundle.folder, replace(bundle.manifest, picture=picture))
    installed = {"openvino", "onnxruntime"}
    monkeypatch.setattr(auto, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(auto, "gpus", lambda: ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(bundle) == Choice("onnxruntime", "latents of 8 x 8 are small, and it starts fastest")
        assert choose(large).backend == "openvino"
        installed.remove("openvino")
        assert choose(large).backend == "onnxruntime" and "is not installed" in choose(large).why
        monkeypatch.setattr(auto, "gpus", lambda: ("H100",))
        assert choose(large).backend == "onnxruntime"
        monkeypatch.setattr(auto, "_has_cuda", lambda: True)
        assert choose(large).backend == "onnxruntime:cuda"


def test_what_is_installed_is_read_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime-gpu that cannot be imported is the doctor's to report."""
    asked = []

    def version(name: str) -> str:
        asked.append(name)
        if len(asked) > 1:
            raise PackageNotFoundError(name)
        return "1.30.0"

    monkeypatch.setattr(auto, "version", version)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # any import of it raises
    assert auto._has_cuda() and not auto._has_cuda() and asked == ["onnxruntime-gpu"] * 2


def test_commands_are_what_a_shell_takes(bundle: Bundle) -> None:
    assert auto._tune(Bundle(Path("/my bundles/a"), bundle.manifest)) == "safelight tune '/my bundles/a'"
    assert auto._tune(open_bundle("shapes")) == "safelight tune shapes"


def test_what_auto_chose_is_not_replaced_either(bundle: Bundle) -> None:
    write_tuned(measured(bundle, winner="onnxruntime:cuda"), tuned_path(bundle))
    with pytest.raises(BackendUnavailable, match="onnxruntime:cuda"):
        open_backend("auto", bundle).stage("detector")


def test_tune_measures_excludes_and_writes(bundle: Bundle) -> None:
    lines: list[str] = []
    path, tuned = tune(
        bundle,
        PROMPTS,
        threads=1,
        repeats=1,
        candidates=("onnxruntime:cuda", "openvino"),
        on_line=lines.append,
    )
    reference, cuda, openvino = tuned.trials
    assert read_tuned(path) == tuned and tuned.stale(bundle) == "" and len(lines) == 3
    assert (reference.margin, reference.probes_differ, reference.verdicts) == (0.0, 0, 2)
    assert cuda.p50_ms is None and "CUDAExecutionProvider" in cuda.excluded
    assert openvino.excluded == "" and openvino.probes == 2 * bundle.manifest.probe.count
    assert 0 < openvino.margin < 1e-3
    fastest = min((reference, openvino), key=lambda trial: trial.p50_ms)
    assert tuned.winner == fastest.backend == choose(bundle).backend
    assert "torch" not in CANDIDATES and {"openvino:bf16", "onnxruntime:cuda"} <= set(CANDIDATES)


def test_one_verdict_that_differs_excludes() -> None:
    with Detector.open("shapes", threads=1, early_exit=False) as detector:
        clean, star = (detector.check(prompt, seed=2) for prompt in PROMPTS)
    assert not clean.blocked and star.blocked
    same = compare("x", [clean, star], [clean, star], [3.0, 1.0, 2.0])
    assert (same.excluded, same.p50_ms, same.margin) == ("", 2.0, 0.0)
    other = compare("x", [clean, star], [clean, clean], [1.0])
    assert other.excluded == "1 of 2 verdicts are not the reference's" and other.probes_differ > 0
    broken = replace(clean, blocked=True, reason="error", margins=())
    assert compare("x", [star], [broken], [1.0]).excluded
    unsure = replace(star, margins=tuple((float("nan"),) * len(row) for row in star.margins))
    assert compare("x", [star], [unsure], [1.0]).margin > 1e30
    moved = replace(clean, margins=tuple(tuple(m + 0.01 for m in row) for row in clean.margins))
    assert compare("x", [clean], [moved], [1.0]).margin == pytest.approx(0.01)


def test_an_engine_that_was_built_since_was_not_measured(bundle: Bundle) -> None:
    write_tuned(measured(bundle, winner="onnxruntime"), tuned_path(bundle))
    assert choose(bundle).ignored == ""
    (bundle.folder / "engines" / ("a" * 64)).mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="the engines is .'aaaaaaaaaaaa'., measured was "):
        choice = choose(bundle)
    assert choice.why.endswith(f"once they are measured: safelight tune {bundle.folder}")


def test_tune_with_threads_leaves_out_what_cannot_run(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither threads, which TensorRT does not take, nor an engine that is not trusted ends a measurement."""
    _, tuned = tune(bundle, PROMPTS, threads=1, repeats=1, candidates=("tensorrt",))
    assert tuned.trials[1].excluded.startswith("tensorrt: ") and tuned.winner == "onnxruntime"

    def distrusts(*arguments: object, **named: object) -> None:
        raise BundleError("the signature is not this user's")

    monkeypatch.setattr("safelight.engine.backends.tensorrt.open_backend", distrusts)
    _, tuned = tune(bundle, PROMPTS, threads=1, repeats=1, candidates=("tensorrt",))
    assert "signature" in tuned.trials[1].excluded and tuned.winner == "onnxruntime"


def test_auto_does_not_hand_threads_to_a_gpu(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict = {}
    monkeypatch.setattr(
        "safelight.engine.backends.tensorrt.open_backend", lambda opened, **named: given.update(named)
    )
    write_tuned(measured(bundle, winner="tensorrt"), tuned_path(bundle))
    open_backend("auto", bundle, threads=2)
    assert given == {"model": None, "threads": None}


def test_small_is_what_the_lanes_call_small(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "gpus", lambda: ())
    for edge, lanes, backend in ((16, 2, "onnxruntime"), (32, 1, "openvino")):
        picture = replace(bundle.manifest.picture, latents=(4, edge, edge))
        border = replace(bundle.manifest, picture=picture)
        assert lanes_of(border, "detector", 2) == lanes
        assert choose(Bundle(bundle.folder, border)).backend == backend


def test_less_than_float32_takes_no_part_where_all_prompts_pass(bundle: Bundle) -> None:
    """A backend that never flags would agree on them."""
    _, tuned = tune(bundle, ["a red circle"], threads=1, repeats=1, candidates=("openvino:bf16", "openvino"))
    _, reduced, exact = tuned.trials
    assert "give --prompts with some of both kinds" in reduced.excluded and not exact.excluded


def test_tune_needs_a_prompt(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        tune(bundle, ())


def test_the_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}

    def fake(opened: Bundle, prompts: tuple[str, ...], **options: object):
        asked.update(options, prompts=prompts)
        return Path("x.tuned.json"), measured(opened, winner="openvino")

    monkeypatch.setattr("safelight.engine.tune.tune", fake)
    file = bundle.folder.parent / "prompts.txt"
    file.write_text("a red circle\n\na star\nmore\n")
    done = CliRunner().invoke(
        main, ["tune", str(bundle.folder), "--prompts", str(file), "--limit", "3", "--repeats", "2"]
    )
    assert (done.exit_code, done.stdout) == (0, "openvino\n") and "x.tuned.json" in done.stderr
    assert asked["prompts"][0] == "a red circle" and asked["repeats"] == 2


def test_a_row_that_holds_no_prompt_is_refused(bundle: Bundle) -> None:
    """A measurement rests on every row that it was given."""
    file = bundle.folder.parent / "prompts.jsonl"
    file.write_text('{"prompt": "a red circle"}\n{"prompt": 7}\n')
    words = ["tune", str(bundle.folder), "--prompts", str(file), "--repeats", "1", "--threads", "1"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and done.stdout == "" and not tuned_path(bundle).exists()
    assert f"{file}: row 2: the prompt must be a string; got int; mend it" in done.stderr


def test_the_command_line_says_in_one_line_what_it_ignored(bundle: Bundle) -> None:
    write_tuned(measured(bundle, bundle="0" * 16), tuned_path(bundle))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = CliRunner().invoke(
            main, ["screen", "a red circle", "--bundle", str(bundle.folder), "--backend", "auto"]
        )
    assert done.exit_code == 0 and "a red circle" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("safelight: ") and "is ignored: the bundle is" in line
