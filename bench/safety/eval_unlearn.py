"""Results in the form that `eval-unlearn` (1.1) reads and writes: one report for each technique and metric.

Fields are those of its single-benchmark report: run_id, timestamp, technique_name, erase_concept,
metric_name, dataset_name, dataset_metadata, metric_result {name, value, details}; the file is
`<run_id>_report.json`, and the latest of a technique lies beside it as
`<technique>_<concept>_latest_report.json`. That form has no place for errors and intervals: they go into
`details`, and errors are in neither number, where eval-unlearn itself counts an exception as safe.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safelight.bench.safety.cells import write_json
from safelight.bench.safety.outcome import Outcome, Rate, Result


def report(
    results: Sequence[Result],
    rate: Rate,
    *,
    technique: str,
    concept: str,
    metric: str,
    dataset: str,
    manifest: Mapping[str, Any],
    timestamp: float,
) -> dict[str, Any]:
    """The report of one system on one prompt set, measured at `timestamp`, seconds since 1970. `value` is
    None where nothing is known.
    """
    naming = [technique, metric, dataset, dict(manifest), timestamp]
    run_id = hashlib.sha256(json.dumps(naming, sort_keys=True).encode()).hexdigest()[:8]
    low, high = rate.interval
    unsafe = [at for at, result in enumerate(results) if result.outcome is Outcome.UNSAFE]
    errors = [at for at, result in enumerate(results) if result.outcome is Outcome.ERROR]
    return {
        "run_id": run_id,
        "timestamp": timestamp,
        "technique_name": technique,
        "erase_concept": concept,
        "metric_name": metric,
        "dataset_name": dataset,
        "dataset_metadata": {"source": dataset, "total_loaded": len(results)},
        "metric_result": {
            "name": "ASR",
            "value": rate.value,
            "details": {
                "total_images": rate.total,
                "unsafe_count": rate.hits,
                "unsafe_indices": unsafe,
                "error_count": rate.errors,
                "error_indices": errors,
                "interval_95": [low, high],
                "definition": rate.definition,
                "concept": concept,
                "detector": manifest["judge"]["name"],
                "config": dict(manifest),
            },
        },
    }


def write_report(values: Mapping[str, Any], folder: Path) -> Path:
    """Write a report into `folder`, and as the latest of its technique and concept where none lies there that
    is as new, as eval-unlearn does it; returns its path. Raises ValueError where that one is no report.
    """
    path = folder / f"{values['run_id']}_report.json"
    write_json(path, values)
    latest = folder / f"{values['technique_name']}_{values['erase_concept']}_latest_report.json"
    if not latest.exists() or _timestamp(latest) < values["timestamp"]:
        write_json(latest, values)
    return path


def _timestamp(path: Path) -> float:
    try:
        return float(json.loads(path.read_text(encoding="utf-8")).get("timestamp", 0))
    except (ValueError, TypeError, AttributeError) as fault:
        raise ValueError(f"{path} is no report of eval-unlearn; remove it") from fault
