"""`safelight screen`: verdicts on prompts, from the command line or from a file."""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from safelight.cli.options import BLOCKED, SEED, model_options, open_detector, probe_options
from safelight.verdict import Verdict

if TYPE_CHECKING:
    from safelight.engine.detect import Detector

HEAD = f"{'verdict':8}{'score':>6}{'limit':>7}{'ms':>7}  prompt"


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("-i", "--input", type=click.Path(path_type=Path), help="A .txt, .csv, .jsonl or .parquet file.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A .jsonl, .csv or .parquet file.")
@click.option(
    "--column", default="prompt", show_default=True, help="Column, or JSON key, that holds the prompt."
)
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object per prompt; with -i, of the whole job."
)
@click.option(
    "--save-probes", "folder", type=click.Path(path_type=Path), help="Folder for the probes' pictures."
)
@click.option("--fail-on-block", is_flag=True, help="Exit with code 3 if any prompt is blocked.")
@click.option("--seed", type=SEED, help="Makes the verdict repeatable, and predictable to an attacker.")
@model_options
@probe_options
def screen(**options: Any) -> int:
    """Probe the neighbourhood of each PROMPT and say whether it is blocked.

    With -i and -o a file of prompts is screened. The job goes on where an earlier one of the same bundle,
    policy and input stopped; a row that holds no usable prompt is blocked, counted and named, and does not
    stop it.
    """
    prompts, source, target = options.pop("prompts"), options.pop("input"), options.pop("output")
    if bool(prompts) == bool(source):
        raise click.UsageError("give either PROMPTs or -i FILE")
    if bool(source) != bool(target):
        raise click.UsageError("-i and -o go together: one file to read, one to write")
    if options["folder"] is not None and options["checker"] != "image":
        raise click.UsageError(
            "--save-probes needs --checker image: the others look at probes without a picture"
        )
    column, fail, as_json = options.pop("column"), options.pop("fail_on_block"), options.pop("as_json")
    job = {"seed": options.pop("seed"), "folder": options.pop("folder"), "as_json": as_json}
    if source is None:
        with closing(open_detector(options)) as detector:
            blocked = _screen_prompts(detector, prompts, **job)
    else:
        blocked = _screen_file(options, source, target, column, **job)
    return BLOCKED if fail and blocked else 0


def _screen_prompts(
    detector: "Detector", prompts: tuple[str, ...], *, seed: int | None, folder: Path | None, as_json: bool
) -> int:
    """Screen and print each prompt; returns how many were blocked."""
    from safelight.engine.screen import screen_prompt

    if not as_json:
        click.echo(HEAD)
    blocked = 0
    for number, prompt in enumerate(prompts, start=1):
        verdict = screen_prompt(detector, prompt, number, seed=seed, probes_folder=folder)
        blocked += verdict.blocked
        if as_json:
            click.echo(json.dumps({"prompt": prompt} | verdict.to_json()))
            continue
        click.echo(line(prompt, verdict))
        for note in _notes(verdict):
            click.echo(f"safelight: {prompt!r}: {note}", err=True)
    return blocked


def line(prompt: str, verdict: Verdict) -> str:
    """One line of the table under `HEAD`."""
    word = click.style(
        f"{'blocked' if verdict.blocked else 'passed':8}", fg="red" if verdict.blocked else "green"
    )
    spent = verdict.timings_ms.get("total", float("nan"))
    shown = "".join(character if character.isprintable() else " " for character in prompt)
    return f"{word}{verdict.score:6.3g}{verdict.threshold:7.3g}{spent:7.0f}  {shown}"


def _notes(verdict: Verdict) -> list[str]:
    notes = (
        [f"{verdict.reason}: {verdict.detail or 'blocked'}"]
        if verdict.reason not in (None, "concept")
        else []
    )
    if verdict.truncated_tokens:
        notes.append(
            f"the last {verdict.truncated_tokens} tokens lie past the model's window and were not screened"
        )
    return notes


def _screen_file(
    options: dict[str, Any],
    source: Path,
    target: Path,
    column: str,
    *,
    seed: int | None,
    folder: Path | None,
    as_json: bool,
) -> int:
    """Run the job with a progress bar on stderr; returns how many rows are blocked."""
    from safelight.engine.prompt_file import count_rows
    from safelight.engine.screen import screen_file

    rows = count_rows(source, column)
    bar = click.progressbar(length=rows, label="screening", file=sys.stderr, hidden=not sys.stderr.isatty())
    with closing(open_detector(options)) as detector, bar:
        summary = screen_file(
            detector,
            source,
            target,
            column=column,
            seed=seed,
            probes_folder=folder,
            on_row=lambda: bar.update(1),
        )
    for fault in summary.faults:
        click.echo(f"safelight: {source}: {fault}", err=True)
    click.echo(f"safelight: {target}: {summary}", err=True)
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    return summary.blocked
