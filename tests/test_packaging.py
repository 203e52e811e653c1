"""What is shipped: the sdist makes the wheel; the wheel holds the rooms and the bundle, no weights."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["scikit-build"]["wheel"]["packages"]


def build(kind: str, source: Path, out: Path) -> Path:
    """Call the build backend's hook as an installer would, in a fresh interpreter; returns its file."""
    code = f"import sys; from scikit_build_core import build; print(build.build_{kind}(sys.argv[1]))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", code, str(out)]
    done = subprocess.run(
        command, cwd=source, capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made from the unpacked sdist, so that nothing outside the sdist can be in it."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def modules_of(source: str) -> set[str]:
    """The Python files below a folder of the repository, as paths from that folder."""
    return {path.relative_to(ROOT / source).as_posix() for path in (ROOT / source).rglob("*.py")}


def test_wheel_is_pure_and_carries_the_version(wheel: Path) -> None:
    version = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "src/safelight/__init__.py").read_text(encoding="utf-8"), re.M
    )
    assert version is not None
    assert wheel.name == f"safelight-{version[1]}-py3-none-any.whl"


@pytest.mark.parametrize("target", sorted(PACKAGES))
def test_every_module_of_a_room_is_in_the_wheel(names: set[str], target: str) -> None:
    expected = {f"{target}/{name}" for name in modules_of(PACKAGES[target])}
    assert sorted(expected - names) == []


def test_wheel_holds_the_bundle_whole(names: set[str]) -> None:
    bundle = ROOT / "models/shapes/bundle"
    files = {
        f"safelight/models/shapes/bundle/{path.relative_to(bundle).as_posix()}"
        for path in bundle.rglob("*")
        if path.is_file()
    }
    assert "safelight/models/shapes/bundle/safelight.json" in files
    assert sorted(files - names) == []


def test_wheel_holds_nothing_else(names: set[str]) -> None:
    weights = [name for name in names if re.search(r"\.(safetensors|bin|pt|pth|ckpt|pkl|npy)$", name)]
    assert weights == []
    strays = [
        name
        for name in names
        if re.search(r"(^|/)(\.dev|\.venv|__pycache__|tests|tools|examples|out|stages/.*\.csv)/", name)
    ]
    assert strays == []
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"safelight"}


def test_wheel_holds_types_licence_and_command(wheel: Path, names: set[str]) -> None:
    assert "safelight/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    with zipfile.ZipFile(wheel) as archive:
        points = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert "safelight = safelight.cli:main" in archive.read(points).decode()


def test_sdist_holds_sources_and_no_links(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    paths = {member.name.partition("/")[2] for member in members}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints.txt",
        "Makefile",
        "tools/devlinks.py",
    } <= paths
    assert [
        path for path in paths if path.partition("/")[0] in {".dev", ".venv", "out", "dist", ".git"}
    ] == []
    assert [member.name for member in members if member.issym() or member.islnk()] == []


def pins() -> dict[str, str]:
    """name -> version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(separator and re.fullmatch(r"[\w.]+", version) for _, separator, version in pairs)
    return {canonicalize_name(name): version for name, _, version in pairs}


OF_A_GPU = ("nvidia-", "cuda-")  # what PyTorch's CUDA build brings; the list is that of its CPU build


def closure(requirements: Iterable[str], extras: frozenset[str]) -> set[tuple[str, frozenset[str]]]:
    """(name, extras) of all that these requirements install, transitively, as the metadata here says."""
    found: set[tuple[str, frozenset[str]]] = set()
    todo = [(Requirement(text), extras) for text in requirements]
    while todo:
        requirement, active = todo.pop()
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in active | {""}
        ):
            continue
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key[0].startswith(OF_A_GPU):
            continue
        if key in found:
            continue
        found.add(key)
        if key[0] == "safelight":
            texts = [text for extra in key[1] for text in PROJECT["project"]["optional-dependencies"][extra]]
        else:
            texts = distribution(key[0]).requires or []
        todo += [(Requirement(text), key[1]) for text in texts]
    return found


def test_every_dependency_is_pinned_at_the_version_installed() -> None:
    wanted = closure([*PROJECT["project"]["dependencies"], "safelight[dev]"], frozenset())
    names = {name for name, _ in wanted} - {"safelight"}
    installed = {name: distribution(name).version.partition("+")[0] for name in names}
    assert {name: pins().get(name) for name in names} == installed
    if sys.version_info[:2] == (
        3,
        11,
    ):  # the list is resolved there; other versions of Python need a little less
        assert sorted(set(pins()) - names) == [], "pinned, and needed by nothing"


def test_lean_core_brings_no_torch() -> None:
    names = {name for name, _ in closure(PROJECT["project"]["dependencies"], frozenset())}
    assert names.isdisjoint(
        {"torch", "diffusers", "transformers", "onnx", "safetensors", "matplotlib", "pyarrow"}
    )


def test_requirements_are_ranges() -> None:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    requirements = [
        Requirement(text) for group in groups for text in group if not text.startswith("safelight[")
    ]
    assert [str(requirement) for requirement in requirements if "==" in str(requirement.specifier)] == []
    assert [str(requirement) for requirement in requirements if not requirement.specifier] == []
