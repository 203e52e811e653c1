"""What an ONNX file refers to: domains of operators and locations of external data. Opens no runtime.

Reads just enough protobuf to visit every node and every tensor (onnx.proto, IR version 10).
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

# Where operators and tensors can lie: message -> {field number: the message in it}, by onnx.proto.
_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _TRAINING, _OPSET, _ENTRY = range(10)
_INSIDE = {
    _MODEL: {7: _GRAPH, 8: _OPSET, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _TENSOR: {13: _ENTRY},  # external_data, entries of key (1) and value (2)
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 9: _OPSET, 11: _ATTRIBUTE},
}
_DOMAIN_OF = {_NODE: 7, _FUNCTION: 10}  # message -> the field that holds its domain
_DOMAIN, _LOCATION = "domain", "location"

Span = tuple[int, int]


def references(path: Path) -> tuple[set[str], set[str]]:
    """The domains of an ONNX file's operators, and the locations of its external data.

    Subgraphs, functions and training graphs are walked too. The file must not be empty. Raises ValueError
    where it cannot be a protobuf message of this kind.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            found = set(_walk(data, (0, len(data)), _MODEL))
        except (IndexError, RecursionError):
            raise ValueError("a message ends early, or messages are nested too deep") from None
    domains = {text for kind, text in found if kind == _DOMAIN}
    return domains, {text for kind, text in found if kind == _LOCATION}


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint is too long")


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span]]:
    """Length-delimited fields of the message at `span`: (field number, where its content lies)."""
    at, end = span
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 2:
            size, at = _varint(data, at)
            if at + size > end:
                raise ValueError("a field reaches past its message")
            yield key >> 3, (at, at + size)
            at += size
        elif kind == 0:
            _, at = _varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
    if at > end:
        raise ValueError("a number reaches past its message")


def _text(data: mmap.mmap, span: Span, wanted: int) -> str:
    found = [data[field[0] : field[1]].decode() for number, field in _fields(data, span) if number == wanted]
    return found[-1] if found else ""


def _walk(data: mmap.mmap, span: Span, message: int) -> Iterator[tuple[str, str]]:
    """What a message and those inside it refer to: (`domain`, of operators), (`location`, of data)."""
    if message == _OPSET:
        yield _DOMAIN, _text(data, span, 1)
    elif message == _ENTRY:
        if _text(data, span, 1) == _LOCATION:
            yield _LOCATION, _text(data, span, 2)
    else:
        inside, domain = _INSIDE[message], _DOMAIN_OF.get(message)
        for number, field in _fields(data, span):
            if number in inside:
                yield from _walk(data, field, inside[number])
            elif number == domain and field[0] < field[1]:
                yield _DOMAIN, data[slice(*field)].decode()
