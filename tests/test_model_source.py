"""Where a model comes from: a hub that is a small server here, a cache, or a folder."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from safelight.engine.model_source import AUTOENCODER, CHECKER, find_model, locate_model
from safelight.errors import BundleError

HEAD, OLD = "a" * 40, "b" * 40
NAME = "lamp/turbo"
FILES = {
    "model_index.json": "{}",
    "README.md": "read me",
    "turbo.safetensors": "all in one file",
    "turbo.ckpt": "a pickle",
    "unet/config.json": "{}",
    "unet/diffusion_pytorch_model.safetensors": "wide",
    "unet/diffusion_pytorch_model.fp16.safetensors": "half",
    "unet/diffusion_pytorch_model.non_ema.safetensors": "another",
    "unet/diffusion_pytorch_model.bin": "a pickle",
    "unet/model.py": "code",
    "vae/config.json": "{}",
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors": "one",
    "vae/diffusion_pytorch_model-00002-of-00002.safetensors": "two",
    "vae/diffusion_pytorch_model.safetensors.index.json": "{}",
    "tokenizer/merges.txt": "#",
    "tokenizer/nested/deep.json": "{}",
    "vae_1_0/config.json": "{}",
    "safety_checker/model.safetensors": "checker",
    "feature_extractor/preprocessor_config.json": "{}",
    "unet/[x].json": "a pattern",
}
PLAIN = {
    *("model_index.json", "unet/config.json", "vae/config.json", "tokenizer/merges.txt"),
    *("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"),
    *(name for name in FILES if name.startswith("vae/diffusion")),
}


class Hub(BaseHTTPRequestHandler):
    """One repository with a branch and two commits, as the hub's own interface shows it."""

    asked: list[str] = []
    down = False

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        Hub.asked.append(path)
        if Hub.down:
            self.answer(503, b"")
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(text), "oid": blob(name)}
                for name, text in FILES.items()
            ]
            self.answer(200, json.dumps(listed).encode())
        elif path.startswith("/api/models/"):
            self.info(path)
        else:
            self.file(path)

    def info(self, path: str) -> None:
        revision = path.partition("/revision/")[2] or "main"
        commit = {"main": HEAD, HEAD: HEAD, OLD: OLD}.get(revision)
        if not path.startswith(f"/api/models/{NAME}") or commit is None:
            code = "RevisionNotFound" if path.startswith(f"/api/models/{NAME}") else "RepoNotFound"
            self.answer(404, b"", {"X-Error-Code": code})
            return
        found = {"id": NAME, "sha": commit, "siblings": [{"rfilename": name} for name in FILES]}
        self.answer(200, json.dumps(found).encode())

    def file(self, path: str) -> None:
        _, _, rest = path.partition("/resolve/")
        commit, _, name = rest.partition("/")
        if name not in FILES:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        self.answer(200, FILES[name].encode(), {"X-Repo-Commit": commit, "ETag": f'"{blob(name)}"'})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def blob(name: str) -> str:
    return hashlib.sha1(FILES[name].encode()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub of its own and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    Hub.asked, Hub.down = [], False
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield Hub
    server.shutdown()
    server.server_close()


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_name_is_resolved_to_its_commit_once_and_only_then_fetched(hub: type[Hub]) -> None:
    found = locate_model(NAME)
    assert (found.name, found.revision, found.path.name) == (NAME, HEAD, HEAD)
    assert names(found.path) == PLAIN | {"unet/diffusion_pytorch_model.safetensors"}
    resolved = [path for path in hub.asked if path.startswith("/api/models/") and HEAD not in path]
    assert resolved == [f"/api/models/{NAME}"]
    fetched = {path for path in hub.asked if "/resolve/" in path}
    assert fetched and all(f"/resolve/{HEAD}/" in path for path in fetched)


@pytest.mark.parametrize("text", [f"{NAME}@{OLD}", f"{NAME}@main"])
def test_a_revision_is_pinned_behind_the_name_or_beside_it(hub: type[Hub], text: str) -> None:
    identity, _, revision = text.partition("@")
    commit = OLD if revision == OLD else HEAD
    assert locate_model(text) == locate_model(identity, revision=revision)
    assert locate_model(text).revision == commit and find_model(text).name == commit
    with pytest.raises(ValueError, match="pin two revisions"):
        locate_model(text, revision="c" * 40)


def test_a_variant_alone_is_fetched(hub: type[Hub]) -> None:
    found = names(locate_model(NAME, variant="fp16").path)
    assert {name for name in found if "unet/diff" in name} == {
        "unet/diffusion_pytorch_model.fp16.safetensors"
    }
    with pytest.raises(ValueError, match=r"variant must be one of \('fp16',\), or none; got 'bf16'"):
        locate_model(NAME, variant="bf16")


def test_the_parts_of_a_checker_or_of_an_autoencoder_alone(hub: type[Hub]) -> None:
    found = names(locate_model(NAME, parts=CHECKER).path) - {"model_index.json"}
    assert found == {name for name in PLAIN if name.startswith(CHECKER)}
    more = names(locate_model(NAME, parts=AUTOENCODER).path) - found
    assert more == {name for name in PLAIN if name.startswith("vae/") or name == "model_index.json"}


@pytest.mark.parametrize("how", ["closed", "offline", "down"])
def test_without_the_hub_a_commit_in_the_cache_is_used_and_no_other(
    hub: type[Hub], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = locate_model(f"{NAME}@{OLD}")
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "closed":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.down = how == "down"
    assert locate_model(f"{NAME}@{OLD}") == before
    for text, message in (
        (NAME, "does not say which commit its head is"),
        (f"{NAME}@main", "does not say which commit main is"),
        (f"{NAME}@{HEAD}", f"{NAME}@{HEAD} was not fetched before, and the hub does not give it"),
    ):
        with pytest.raises(BundleError, match=message) as caught:
            locate_model(text)
        assert str(caught.value).isprintable() and "name a local folder" in str(caught.value)


def test_what_the_hub_does_not_have_is_one_sentence(hub: type[Hub]) -> None:
    for text in ("lamp/none", f"{NAME}@v9", f"{NAME}@{'c' * 40}"):
        with pytest.raises(BundleError, match=r"; name a local folder") as caught:
            locate_model(text)
        assert str(caught.value).isprintable()
    with pytest.raises(BundleError, match=r"holds none of \['nothing'\]"):
        FILES.pop("model_index.json")
        try:
            locate_model(NAME, parts=("nothing",))
        finally:
            FILES["model_index.json"] = "{}"


@pytest.mark.parametrize("text", ["./none", "/none/such", "none", "a/b/c", "~/model"])
def test_what_is_no_hub_id_is_never_asked_for(hub: type[Hub], text: str) -> None:
    with pytest.raises(BundleError, match="is no folder; name a local diffusers folder"):
        locate_model(text)
    assert hub.asked == []


def test_a_folder_has_a_name_and_no_revision(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    found = locate_model(tmp_path / "mine")
    assert (found.path, found.name, found.revision) == (tmp_path / "mine", "mine", None)
    with pytest.raises(ValueError, match="is a folder and has no revisions; got 'main'"):
        locate_model(tmp_path / "mine", revision="main")


@pytest.mark.parametrize(("name", "revision"), [(f"{NAME}@", None), (NAME, ""), (f"{NAME}@{OLD}", "")])
def test_an_empty_revision_does_not_unpin(hub: type[Hub], name: str, revision: str | None) -> None:
    """What a shell makes of a variable that is not set."""
    with pytest.raises(ValueError, match="names an empty revision.*name a commit"):
        locate_model(name, revision=revision)
    assert hub.asked == []
