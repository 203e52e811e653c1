"""The whole of an evaluation: model folders and names in, measured cells and a report out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safelight.bench.safety import plots, table
from safelight.bench.safety.crafting import NAMES, attack_of
from safelight.bench.safety.library import open_systems
from safelight.bench.safety.oracle import OracleJudge
from safelight.bench.safety.prompts import Prompts
from safelight.bench.safety.run import Run, errors_above, manifest_of, measure
from safelight.bench.safety.settings import Settings
from safelight.bench.safety.system import System, standard_rows
from safelight.engine.model_folder import ModelFolder
from safelight.models.shapes import ORACLE_FILE

Progress = Callable[[str], None]


def evaluate(
    models: Mapping[str, Path],
    out: Path,
    settings: Settings,
    *,
    systems: Sequence[System] = (),
    defences: Sequence[str] = (),
    attacks: Sequence[str] = (),
    oracle: Path = ORACLE_FILE,
    jobs: int = 1,
    max_error_rate: float = 0.0,
    other_commit: bool = False,
    progress: Progress = lambda line: None,
) -> list[str]:
    """Measure what is missing in `out`, write the report there, and return the cells with too many errors.

    `models` as in `standard_rows`; `systems` are rows of the caller's own beside those; `defences` names the
    rows, all that have their models where empty; `attacks` likewise. A run that was stopped goes on. Raises
    ValueError for an unknown name or a row whose model is missing, SafelightError where `out` holds a run of
    another manifest, BundleError for a folder that cannot be used.
    """
    errors_above({}, max_error_rate)  # its range, before hours are spent
    for name in dict.fromkeys(attacks):
        if name not in NAMES:
            raise ValueError(f"attack must be one of {NAMES}; got {name!r}")
    known = standard_rows(models, settings) | {system.name: system for system in systems}
    absent = {name: row for name, row in known.items() if isinstance(row, str)}
    wanted = list(dict.fromkeys(defences)) or [name for name in known if name not in absent]
    for name in wanted:
        if name not in known:
            raise ValueError(f"a row must be one of {tuple(known)}; got {name!r}")
        if name in absent:
            raise ValueError(f"the row {name} {absent[name]}")
    for path in models.values():
        ModelFolder.open(path)  # all of them, before the first is exported
    needed = {name: row for name in ("none", *wanted) if isinstance(row := known[name], System)}
    opened = open_systems(needed, out, guidance_scale=settings.guidance_scale, progress=progress)
    rows, base = {name: opened[name] for name in wanted}, opened["none"]  # undefended, asked for or not
    angle = base.bundle.manifest.probe.angle_rad
    chosen = {name: attack_of(name, settings, angle) for name in dict.fromkeys(attacks or NAMES)}
    manifest = manifest_of(settings, Prompts.make(settings), OracleJudge(oracle), base)
    run = Run(out, settings, rows, base, chosen, manifest, oracle)
    run.cells().open(other_commit=other_commit)
    try:
        measure(run, jobs=jobs, progress=progress)
    finally:  # what there is so far can be looked at, whatever stopped the run
        results = table.collect(run, absent)
        table.write(results, out)
    plots.plot_all(results, out)
    return errors_above(table.measured(results), max_error_rate)
