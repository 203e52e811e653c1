"""Prompts from files: every row is yielded, with the prompt or with the reason why there is none."""

import csv
from pathlib import Path

import pytest

from safelight.engine.prompt_file import all_prompts, count_rows, read_prompts
from safelight.errors import SafelightError


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("in.txt", b"\xef\xbb\xbfone\r\n\r\n  \ntwo \n\xff\nthree", ["one", "two ", None, "three"]),
        ("in.jsonl", b'{"prompt": ""}\n\n{}\n"bare"\n', ["", None, "bare"]),
        ("in.csv", b'\xef\xbb\xbfprompt,id\r\n"a\r\nb",1\r\n\r\n,2\r\n', ["a\r\nb", ""]),
    ],
)
def test_rows_are_read_and_counted_alike(
    tmp_path: Path, name: str, content: bytes, prompts: list[str | None]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert [row.prompt for row in read_prompts(path)] == prompts
    assert count_rows(path) == len(prompts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.csv", b"prompt\n"),
        ("in.csv", b""),
        ("in.txt", b""),
        ("in.txt", b" \n\r\n"),
        ("in.jsonl", b"\n"),
    ],
)
def test_a_file_without_a_row_is_the_callers_mistake(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert count_rows(path) == 0
    with pytest.raises(ValueError, match=f"{name}: holds no row; give at least one prompt"):
        next(read_prompts(path))


def test_the_same_prompt_has_the_same_digest_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a star\n")
    (tmp_path / "a.jsonl").write_text('{"n": 1, "prompt": "a \\u0073tar"}\n')
    (tmp_path / "a.csv").write_text('prompt\n"a star"\n')
    assert len({next(read_prompts(path)).digest for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("name", ["in.txt", "in.csv", "in.jsonl"])
@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("order", ["le", "be"])
def test_text_that_is_marked_as_no_utf_8_is_refused_as_a_whole(
    tmp_path: Path, name: str, encoding: str, order: str
) -> None:
    path = tmp_path / name
    path.write_bytes('\ufeffprompt\n"a star"\n'.encode(f"{encoding}-{order}"))
    for read in (count_rows, lambda path: next(read_prompts(path)), lambda path: next(all_prompts(path))):
        with pytest.raises(ValueError, match=f"{name}: is {encoding} text; save it as UTF-8"):
            read(path)
    path.write_bytes('\ufeffprompt\n"a star"\n'.encode())
    assert list(read_prompts(path))[-1].prompt == ('"a star"' if name == "in.txt" else "a star")


def test_bad_csv_records(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    long = b"x" * (csv.field_size_limit() + 1)
    source.write_bytes(b'id,prompt\n1,fine\n2\n\n3,\xff\n4,"a" b\n5,' + long + b'\n6,also fine\n7,"open')
    rows = list(read_prompts(source))
    assert [row.prompt for row in rows] == ["fine", None, None, None, None, "also fine", None]
    faults = ["no column", "not valid Unicode", "not CSV", "field larger", "not CSV"]
    assert all(
        part in (row.fault or "") for part, row in zip(faults, [r for r in rows if r.fault], strict=True)
    )
    assert len({row.digest for row in rows}) == len(rows)


def test_bad_parquet_rows(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"prompt": ["ok", None]}), tmp_path / "null.parquet")
    parquet.write_table(pa.table({"prompt": [1, 2]}), tmp_path / "int.parquet")
    encoded = pa.array(["a", "a"]).dictionary_encode()
    parquet.write_table(pa.table({"prompt": encoded}), tmp_path / "dictionary.parquet")
    assert [row.prompt for row in read_prompts(tmp_path / "null.parquet")] == ["ok", None]
    assert {row.fault for row in read_prompts(tmp_path / "int.parquet")} == {
        "the prompt must be a string; got int"
    }
    assert [row.prompt for row in read_prompts(tmp_path / "dictionary.parquet")] == ["a", "a"]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SafelightError, match="broken.parquet: not a readable parquet"):
        list(read_prompts(tmp_path / "broken.parquet"))
