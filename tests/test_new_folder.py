"""A new folder appears whole or not at all, whoever else writes the same one."""

import errno
from pathlib import Path

import pytest

from safelight.errors import SafelightError
from safelight.new_folder import new_folder


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_second_of_two_is_told_that_the_target_is_taken(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(SafelightError, match="out exists and is not an empty folder; name a new one"),
        new_folder(target) as partial,
    ):
        (partial / "graph").write_text("second")
        if kind == "file":
            target.write_text("first")
        else:
            with new_folder(target) as first:
                (first / "graph").write_text("first")
    assert (target / "graph" if kind == "folder" else target).read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_said_with_the_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OSError, match="No space left") as caught, new_folder(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(target) and list(tmp_path.iterdir()) == []


def test_other_faults_stay_as_they_are(tmp_path: Path) -> None:
    fault = OSError(errno.ECONNREFUSED, "Connection refused")
    with pytest.raises(OSError, match="refused") as caught, new_folder(tmp_path / "out"):
        raise fault
    assert caught.value is fault and list(tmp_path.iterdir()) == []
