"""What may lie in a bundle, judged by name, inode and bytes; each attack is one line that names the file."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safelight.containment import (
    CLASSES,
    CODE,
    check_classes,
    check_file,
    check_kind,
    check_name,
    list_files,
    read_json,
)
from safelight.errors import BundleError


def refused(call, *args, words=(), **named):
    """The one line with which a call is refused; it holds all `words` and a remedy."""
    with pytest.raises(BundleError) as caught:
        call(*args, **named)
    message = str(caught.value)
    assert message.isprintable(), f"not one printable line: {message!r}"
    for word in (words, ";") if isinstance(words, str) else (*words, ";"):
        assert word in message
    return message


PART = st.from_regex(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,20}", fullmatch=True)


@given(st.lists(PART, min_size=1, max_size=8))
def test_plain_parts_are_a_name(parts):
    name = "/".join(parts)
    assert check_name(name) == name


@given(st.text())
@example("..")
@example("a\n")
@example("a/b\x00")
@example("ａ")  # a full-width letter
def test_a_name_is_accepted_only_if_it_stays_inside(name):
    try:
        check_name(name)
    except BundleError as fault:
        assert str(fault).isprintable() and repr(name) in str(fault)
    else:
        assert name.isascii() and name.isprintable() and not set(name) & set("\\ :~$%*?<>|\"'")
        assert not any(part == "" or part.startswith(".") for part in name.split("/"))
        assert Path(os.path.normpath(f"/bundle/{name}")) == Path(f"/bundle/{name}")


@given(
    st.lists(PART, min_size=1, max_size=6),
    st.integers(0, 6),
    st.sampled_from(["..", ".", "", ".git", "a\\b"]),
)
def test_one_odd_part_spoils_a_name(parts, at, odd):
    parts.insert(at, odd)
    refused(check_name, "/".join(parts), words="not a path inside the bundle")


def test_nine_parts_are_too_many():
    check_name("/".join("abcdefgh"))
    refused(check_name, "/".join("abcdefghi"))


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "a").mkdir()
    refused(check_file, tmp_path, "a", words=(str(tmp_path / "a"), "not a plain file"))


def test_a_bundle_may_itself_be_reached_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert check_file(tmp_path / "link", "a.json").st_size == 2


@pytest.mark.parametrize("target", ["inside.json", "../outside.json", "/etc/hostname", "nowhere"])
def test_a_symbolic_link_is_refused_wherever_it_leads(tmp_path, target):
    root = tmp_path / "bundle"
    root.mkdir()
    (root / "inside.json").write_text("{}")
    (tmp_path / "outside.json").write_text("{}")
    (root / "a.json").symlink_to(target)
    refused(check_file, root, "a.json", words=(str(root / "a.json"), "symbolic link"))
    refused(check_file, root, "a.json", links=True)


def test_a_linked_folder_on_the_way_is_refused(tmp_path):
    root = tmp_path / "bundle"
    (root / "b").mkdir(parents=True)
    (root / "b" / "x.json").write_text("{}")
    (root / "a").symlink_to("b")
    refused(check_file, root, "a/x.json", words=(str(root / "a" / "x.json"), "symbolic link"))
    refused(lambda: list(list_files(root)), words=(str(root / "a"), "symbolic link"))


def test_hard_links_are_told_by_their_count(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    os.link(tmp_path / "a.json", tmp_path / "b.json")
    refused(check_file, tmp_path, "a.json", words=(str(tmp_path / "a.json"), "hard link (2 names"))
    assert check_file(tmp_path, "a.json", links=True).st_nlink == 2


def test_every_file_is_listed_and_hidden_ones_too(tmp_path):
    for name in ("b.json", ".hidden/.x", "a/c/d.onnx", "a/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "broken").symlink_to("nowhere")
    assert sorted(list_files(tmp_path)) == [".hidden/.x", "a/b.txt", "a/c/d.onnx", "b.json", "broken"]


@pytest.mark.parametrize("name", ["a\nb.md", "\x1b[2Jx.png", "\udcff.md", "a\u202eb.md"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_that_cannot_be_printed_is_refused_and_not_printed(tmp_path, name, kind):
    path = tmp_path / name
    path.touch() if kind == "file" else path.mkdir()
    refused(lambda: list(list_files(tmp_path)), words=(str(tmp_path), "odd name"))


def test_a_folder_that_cannot_be_listed_is_not_skipped(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    real = os.scandir

    def scandir(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(lambda: list(list_files(tmp_path)), words=(str(tmp_path / "shut"), "cannot be listed"))


@pytest.mark.parametrize("suffix", sorted(CODE))
@pytest.mark.parametrize("listed", [False, True])
def test_code_is_refused_listed_or_not_in_any_case(tmp_path, suffix, listed):
    for name in (f"a{suffix}", f"x/y/a.json{suffix.upper()}"):
        refused(check_kind, tmp_path, name, listed=listed, words=(str(tmp_path / name), "may hold code"))


@pytest.mark.parametrize(
    "content, word",
    [
        ("", "not the JSON"),
        ("{", "not the JSON"),
        ('{"a": 1, "a": 2}', "a key occurs twice"),
        ('{"x": [{"a": 1, "a": 1}]}', "a key occurs twice"),
        ("[1]", "got list"),
        ("null", "got NoneType"),
        ('{"a": ' + "[" * 900 + "]" * 900 + "}", "nested deeper"),
        ("[" * 10**6, "not the JSON"),
        ('{"a": %s}' % ("9" * 5000), "not the JSON"),
    ],
)
def test_what_is_not_a_json_object_is_refused(tmp_path, content, word):
    (tmp_path / "a.json").write_text(content)
    refused(read_json, tmp_path / "a.json", words=(str(tmp_path / "a.json"), word))


def test_the_limits_of_depth_and_size_are_exact(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    for depth in (31, 32):
        path.write_text('{"a": ' + "[" * depth + "]" * depth + "}")
        if depth == 31:
            read_json(path)
        else:
            refused(read_json, path, words="nested deeper than 32 levels")
    path.write_text('{"a": 1}')
    monkeypatch.setattr("safelight.containment.MAX_JSON_BYTES", 8)
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": 10}')
    refused(read_json, path, words="larger than")


def test_a_missing_json_file(tmp_path):
    refused(read_json, tmp_path / "none.json", words=(str(tmp_path / "none.json"), "missing"))


@pytest.mark.parametrize("key", ["auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code"])
@pytest.mark.parametrize("around", ["%s", '{"a": %s}', '{"a": [1, [%s]]}', '{"a": {"b": [{"c": %s}]}}'])
def test_a_key_that_imports_code_is_refused_at_any_depth(tmp_path, key, around):
    path = tmp_path / "config.json"
    path.write_text(around % json.dumps({key: None}))
    refused(check_classes, path, words=(str(path), repr(key), "remove the key"))


@pytest.mark.parametrize(
    "values",
    [
        {"_class_name": "Evil"},
        {"architectures": ["CLIPTextModel", "Evil"]},
        {"architectures": [["CLIPTextModel"]]},
        {"tokenizer_class": {"a": 1}},
        {"processor_class": 3},
        {"image_processor_type": "evil.CLIPImageProcessor"},
    ],
)
def test_a_class_off_the_list_is_refused(tmp_path, values):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    refused(check_classes, path, words=(str(path), f"{next(iter(values))} names the class", "allow-list"))


@pytest.mark.parametrize(
    "entry",
    [
        ["diffusers", "Evil"],
        ["evil", "UNet2DConditionModel"],
        ["diffusers", "AutoencoderKL"],
        ["diffusers"],
        [["diffusers"], {"a": 1}],
        [None, "UNet2DConditionModel"],
        ["diffusers", "UNet2DConditionModel", "more"],
    ],
)
def test_an_index_entry_must_be_the_class_of_its_part(tmp_path, entry):
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({"unet": entry}))
    refused(check_classes, path, words=(str(path), "unet names the class", "UNet2DConditionModel"))
    path.write_text(json.dumps({"evil": ["diffusers", "UNet2DConditionModel"]}))
    refused(check_classes, path, words="evil names the class")


def test_every_class_on_the_list_is_accepted_in_its_place(tmp_path):
    path = tmp_path / "model_index.json"
    for part, names in CLASSES.items():
        for name in names:
            path.write_text(
                json.dumps({"_class_name": name, part: ["transformers", name], "other": [None, None]})
            )
            check_classes(path)
