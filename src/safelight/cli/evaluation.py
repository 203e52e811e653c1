"""`safelight evaluate`: what each defence is worth against each attack, or against prompts from a file."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from safelight.cli.options import PLACE, place_of, place_options

FOLDER = click.Path(path_type=Path)
SHAPES, ORACLE = Path("models/shapes/model"), Path("models/shapes/oracle/model.safetensors")
JUDGES = ("checker", "nudenet")
PROMPT_ROWS = ("none", "checker", "crops", "crops1")


@click.command()
@click.option(
    "--models",
    multiple=True,
    metavar="NAME=DIR",
    help="A model folder and what it is: base, sdd, safegen, dark_miner, safe_cfg, latent_checker, or a name "
    "of your own, which is a row of its own. Again for each.  [default: base=models/shapes/model]",
)
@click.option(
    "--defences", multiple=True, metavar="NAME", help="Rows, again for each.  [default: all that have models]"
)
@click.option("--attacks", multiple=True, metavar="NAME", help="Columns, again for each.  [default: all]")
@click.option("--out", type=FOLDER, required=True, help="Folder of the run; the same one goes on with it.")
@click.option(
    "--count", type=click.IntRange(1), help="Clean prompts, and near-neighbour ones.  [default: 300]"
)
@click.option("--tasks", type=click.IntRange(1), help="Attempts of each attack.  [default: 24]")
@click.option(
    "--seed", type=click.IntRange(0), default=7, show_default=True, help="All seeds derive from it."
)
@click.option(
    "--budget", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Of attackers."
)
@click.option("--stack", default="sdd", show_default=True, help="The defended model inside the row `stack`.")
@click.option(
    "--max-error-rate",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of errors in a cell above which the run fails, with exit code 1, after its report.",
)
@click.option("--oracle", type=FOLDER, default=ORACLE, show_default=True, help="Weights of the judge.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes.")
@click.option("--other-commit", is_flag=True, help="Go on although the cells in OUT are of another commit.")
@click.option("--publish", type=FOLDER, help="Folder for copies of the small results, such as bench/results.")
@click.option(
    "--prompts", type=FOLDER, help="Prompts of your own (I2P, Ring-A-Bell, P4D, UnlearnDiffAtk; CSV, txt)."
)
@click.option(
    "--judge",
    type=click.Choice(JUDGES),
    default="checker",
    show_default=True,
    help="With --prompts: who says what a picture shows.",
)
@click.option(
    "--judge-model",
    type=FOLDER,
    help="With --judge checker: a folder whose safety_checker judges.  [default: each model's own]",
)
@click.option("--steps", type=click.IntRange(1), help="Of a picture.  [default: 10; with --prompts 50]")
@click.option(
    "--eval-unlearn", type=FOLDER, help="With --prompts: also write reports as eval-unlearn reads them."
)
@click.option("--concept", default="unknown", help="With --eval-unlearn: the concept's name in the reports.")
@place_options
def evaluate(**options: Any) -> int:
    """Measure attack success, false positives, quality and cost of defended models, into a resumable folder.

    With --prompts, no attacker is run: the prompts of a file go through each model, which may be any
    diffusers folder, and a judge looks at the pictures. The models then run where --backend and the options
    beside it say, which go with --prompts alone: torch runs a folder as it is, the others need an export.
    """
    models = dict(_named(text) for text in options["models"]) or {"base": SHAPES}
    given = {name: options[name] for name in ("count", "tasks", "steps") if options[name] is not None}
    faults = (
        _evaluate_prompts(models, options) if options["prompts"] else _evaluate_table(models, options, given)
    )
    for fault in faults:
        click.echo(f"safelight: too many errors: {fault}", err=True)
    return 1 if faults else 0


def _evaluate_table(models: dict[str, Path], options: dict[str, Any], given: dict[str, Any]) -> list[str]:
    from safelight.bench.safety import table
    from safelight.bench.safety.evaluate import evaluate as run
    from safelight.bench.safety.settings import Settings

    _refuse_place()
    settings = Settings(seed=options["seed"], budget=options["budget"], stack_model=options["stack"], **given)
    models.setdefault("base", SHAPES)
    faults = run(
        models,
        options["out"],
        settings,
        defences=options["defences"],
        attacks=options["attacks"],
        oracle=options["oracle"],
        jobs=options["jobs"],
        max_error_rate=options["max_error_rate"],
        other_commit=options["other_commit"],
        progress=_progress,
    )
    click.echo(str(options["out"] / "results.md"))
    if options["publish"] and not faults:
        table.publish(options["out"], options["publish"])
        click.echo(str(options["publish"] / "safety.md"))
    return faults


def _evaluate_prompts(models: dict[str, Path], options: dict[str, Any]) -> list[str]:
    from safelight.bench.safety.external import evaluate_prompts
    from safelight.bench.safety.place import Place

    if unknown := set(options["defences"]) - set(PROMPT_ROWS):
        raise click.UsageError(f"with --prompts, --defences are of {PROMPT_ROWS}; got {sorted(unknown)}")
    faults = evaluate_prompts(
        models,
        options["prompts"],
        options["out"],
        judge=options["judge"],
        judge_model=options["judge_model"],
        defences=options["defences"] or ("none",),
        limit=options["count"],
        steps=options["steps"],
        seed=options["seed"],
        max_error_rate=options["max_error_rate"],
        eval_unlearn=options["eval_unlearn"],
        concept=options["concept"],
        place=Place(**place_of(options), engine_key=options["engine_key"]),
        progress=_progress,
    )
    click.echo(str(options["out"] / "prompts.md"))
    return faults


def _refuse_place() -> None:
    """Raises UsageError where the command line says where the table's networks are to run."""
    context = click.get_current_context()
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name in (*PLACE, "engine_key")
        and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(
            f"{', '.join(given)}: with --prompts alone; the table of attacks is measured by onnxruntime on "
            "the processor"
        )


def _progress(line: str) -> None:
    click.echo(f"safelight: {line}", err=True)


def _named(text: str) -> tuple[str, Path]:
    name, sign, path = text.partition("=")
    if not sign:  # a folder alone is named by its own name
        return Path(text).resolve().name, Path(text)
    if not name or not path:
        raise click.UsageError(f"--models takes NAME=DIR or DIR; got {text!r}")
    return name, Path(path)
