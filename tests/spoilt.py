"""A bundle made by hand for a test to spoil, and the one line with which it is then refused.

Tests run this file (`runpy`) since test modules cannot import one another.
"""

import runpy
import shutil
from pathlib import Path

import onnxruntime
import pytest

from safelight.errors import BundleError
from safelight.manifest import Manifest

HAND = runpy.run_path(str(Path(__file__).with_name("handmade.py")))
edit, plain, seal = HAND["edit"], HAND["plain"], HAND["seal"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "bundle"
    HAND["build"](folder)
    return folder


@pytest.fixture
def bundle(made, tmp_path):
    """A fresh copy for a test to spoil."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    """No library sees a bundle before it is checked."""

    def opened(*args, **named):
        raise RuntimeError("a bundle was opened before it was checked")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)


def refused(folder, *words, **options):
    """The one line with which `folder` is refused; it holds all `words`."""
    with pytest.raises(BundleError) as caught:
        Manifest.load(folder, **options)
    message = str(caught.value)
    assert message.isprintable(), f"not one printable line: {message!r}"
    for word in (*words, ";"):  # what is wrong; what to do
        assert word in message
    return message
