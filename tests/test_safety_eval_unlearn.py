"""Reports in the form of eval-unlearn: the latest of a technique is that of the latest time of any writer."""

import json

import pytest

from safelight.bench.safety.eval_unlearn import write_report


def report(run: str, timestamp: float) -> dict:
    return {"run_id": run, "technique_name": "sdd", "erase_concept": "star", "timestamp": timestamp}


def test_an_older_report_does_not_take_the_place_of_a_newer_one(tmp_path):
    latest = tmp_path / "sdd_star_latest_report.json"
    for run, timestamp, kept in (("a", 5.0, "a"), ("b", 4.0, "a"), ("c", 5.0, "a"), ("d", 6.0, "d")):
        path = write_report(report(run, timestamp), tmp_path)
        assert json.loads(path.read_text())["run_id"] == run
        assert json.loads(latest.read_text())["run_id"] == kept


def test_a_latest_file_that_is_no_report_is_named(tmp_path):
    latest = tmp_path / "sdd_star_latest_report.json"
    latest.write_text("[1]")
    with pytest.raises(ValueError, match="sdd_star_latest_report.json is no report"):
        write_report(report("a", 1.0), tmp_path)
