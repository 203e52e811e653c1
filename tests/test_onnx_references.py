"""What an ONNX file refers to is found wherever it lies; only standard operators and listed files pass."""

import runpy
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from safelight.containment import check_onnx
from safelight.errors import BundleError

HAND = runpy.run_path(str(Path(__file__).with_name("handmade.py")))
model, external_tensor = HAND["model"], HAND["external_tensor"]
KEPT = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(root, external, words=()):
    """The one line with which unet/model.onnx is refused; it holds all `words` and a remedy."""
    with pytest.raises(BundleError) as caught:
        check_onnx(root, "unet/model.onnx", external)
    message = str(caught.value)
    assert message.isprintable(), f"not one printable line: {message!r}"
    for word in (words, ";") if isinstance(words, str) else (*words, ";"):
        assert word in message
    return message


def write(folder, made):
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "unet" / "model.onnx").write_bytes(
        made if isinstance(made, bytes) else made.SerializeToString()
    )
    return folder / "unet" / "model.onnx"


def then_branch(tensor, *nodes):
    """An If node with `tensor` as an initializer of one branch, y = x + w there and y = x elsewhere."""
    out = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    nodes = nodes or [helper.make_node("Add", ["x", "w"], ["z"])]
    one = helper.make_graph(list(nodes), "then", [], out, initializer=[tensor])
    two = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "else", [], out)
    return helper.make_node("If", ["cond"], ["y"], then_branch=one, else_branch=two)


def loop(node):
    """A Loop whose body holds another node, for nesting deeper than one graph."""
    body = helper.make_graph(
        [node], "body", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    return helper.make_node("Loop", ["", "cond"], ["y"], body=body)


def hidden_places(tensor):
    """Models with `tensor` in each place where onnx.proto lets a tensor lie."""
    sparse = onnx.SparseTensorProto(
        values=tensor, indices=helper.make_tensor("i", TensorProto.INT64, [4], range(4))
    )
    constant = helper.make_node("Constant", [], ["w"], value=tensor)
    many = helper.make_node("Odd", [], ["w"])
    many.attribute.append(onnx.AttributeProto(name="t", type=onnx.AttributeProto.TENSORS, tensors=[tensor]))
    graphs = helper.make_node("Odd", ["x"], ["y"])
    graphs.attribute.append(onnx.AttributeProto(name="g", type=onnx.AttributeProto.GRAPHS))
    graphs.attribute[0].graphs.add().initializer.append(tensor)
    thin = helper.make_node("Constant", [], ["w"])
    thin.attribute.append(
        onnx.AttributeProto(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse)
    )
    function = helper.make_function("local", "F", ["x"], ["w"], [constant], [helper.make_opsetid("", 20)])
    function.domain = ""
    trained = model()
    trained.training_info.add().algorithm.initializer.append(tensor)
    initial = model()
    initial.training_info.add().initialization.node.append(constant)
    rare = model()
    rare.graph.sparse_initializer.append(sparse)
    default = model()
    kept = default.functions.add(name="F")
    kept.attribute_proto.append(onnx.AttributeProto(name="t", type=onnx.AttributeProto.TENSOR, t=tensor))
    return {
        "initializer": model(weights=[tensor]),
        "attribute": model(constant),
        "attribute of many": model(many),
        "one of many graphs": model(graphs),
        "sparse attribute": model(thin),
        "sparse initializer": rare,
        "if": model(then_branch(tensor)),
        "if in loop": model(loop(then_branch(tensor))),
        "loop in loop": model(loop(loop(then_branch(tensor)))),
        "function": model(functions=[function]),
        "default of a function": default,
        "training": trained,
        "start of training": initial,
    }


@pytest.mark.parametrize("place", sorted(hidden_places(external_tensor("x"))))
@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../secret",
        "sub/x.onnx_data",
        "./model.onnx_data",
        "other.onnx_data",
        "*/_ORT_MEM_ADDR_/*",
        "",
    ],
)
def test_external_data_elsewhere_is_refused_wherever_the_tensor_lies(tmp_path, place, location):
    path = write(tmp_path, hidden_places(external_tensor(location))[place])
    listed = ("unet/model.onnx_data",)
    refused(tmp_path, (), words=(str(path), repr(location), "export it again"))
    refused(tmp_path, listed, words=(str(path), repr(location)))


@pytest.mark.parametrize("place", sorted(hidden_places(external_tensor("x"))))
def test_external_data_in_a_listed_file_is_accepted(tmp_path, place):
    path = write(tmp_path, hidden_places(external_tensor("model.onnx_data"))[place])
    check_onnx(tmp_path, "unet/model.onnx", ("unet/model.onnx_data",))
    refused(tmp_path, (), words=(str(path), "'model.onnx_data'"))


def test_data_in_a_subfolder_is_refused_even_where_it_is_listed(tmp_path):
    path = write(tmp_path, model(weights=[external_tensor("sub/w.onnx_data")]))
    refused(tmp_path, ("unet/sub/w.onnx_data",), words=str(path))


def test_a_listed_data_file_must_be_used(tmp_path):
    path = write(tmp_path, model())
    listed = ("unet/model.onnx_data",)
    refused(tmp_path, listed, words=(str(path), "does not use unet/model.onnx_data"))


def test_the_last_of_two_locations_counts_as_protobuf_reads_it(tmp_path):
    tensor = external_tensor("model.onnx_data")
    tensor.external_data[0].value = "AAAA"
    field = b"\x12\x04AAAA"
    whole = model(weights=[tensor]).SerializeToString()
    assert whole.count(field) == 1
    spoilt = whole.replace(field, b"\x12\x00\x12\x02/e")
    assert onnx.load_model_from_string(spoilt).graph.initializer[0].external_data[0].value == "/e"
    path = write(tmp_path, spoilt)
    refused(tmp_path, ("unet/AAAA",), words=(str(path), "'/e'"))


FOREIGN = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="/etc/passwd")


def foreign_places():
    """Models that reach for operators of another domain from each place where a node or an opset can lie."""
    plain = external_tensor("x")
    plain.ClearField("external_data")
    plain.ClearField("data_location")
    plain.float_data.extend([1.0] * 4)
    inner = helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    named = helper.make_function("", "Relu", ["x"], ["y"], [FOREIGN], opsets)
    silent = helper.make_function("", "Relu", ["x"], ["y"], [FOREIGN], opsets[:1])
    importing = helper.make_function("", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opsets)
    own = helper.make_function(
        "local", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], opsets[:1]
    )
    return {
        "opset": (model(opsets=(("", 20), ("ai.onnx.ml", 3))), "ai.onnx.ml"),
        "node without an opset": (model(FOREIGN), "com.microsoft"),
        "node with an opset": (model(FOREIGN, opsets=(("", 20), ("com.microsoft", 1))), "com.microsoft"),
        "if": (model(then_branch(plain, inner)), "com.microsoft"),
        "if in loop": (model(loop(then_branch(plain, inner))), "com.microsoft"),
        "function that shadows an operator": (model(functions=[named]), "com.microsoft"),
        "function without an opset": (model(functions=[silent]), "com.microsoft"),
        "opset of a function": (model(functions=[importing]), "com.microsoft"),
        "domain of a function": (model(functions=[own]), "local"),
    }


@pytest.mark.parametrize("place", sorted(foreign_places()))
def test_operators_of_another_domain_are_refused(tmp_path, place):
    made, domain = foreign_places()[place]
    path = write(tmp_path, made)
    words = (str(path), repr(domain), "only standard ONNX operators")
    refused(tmp_path, (), words=words)


def test_onnxruntime_runs_its_own_operators_without_an_opset():
    """Why every node is looked at: the list of imported opsets does not bound what a graph runs."""
    import onnxruntime

    made = model(helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"))
    assert [item.domain for item in made.opset_import] == [""]
    onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_standard_operators_are_accepted_by_both_names(tmp_path, domain):
    write(tmp_path, model(helper.make_node("Relu", ["x"], ["y"], domain=domain), opsets=((domain, 20),)))
    check_onnx(tmp_path, "unet/model.onnx", ())


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "is empty"),
        (b"not a model at all", "not an ONNX file"),
        (b"\x80" * 40, "not an ONNX file"),
        (bytes(100), "not an ONNX file"),
        (b"\x08\x0a", "imports no operators"),
        (b"\x42\x02\x10\x14\x0d\x00", "not an ONNX file"),
        (b"\x3a\x7f\x00", "not an ONNX file"),
        (b"\x3b\x3c", "not an ONNX file"),
        (b"\x42\x03\x0a\x01\xff", "not an ONNX file"),
    ],
    ids=[
        "empty",
        "text",
        "endless varint",
        "zeros",
        "version only",
        "short",
        "past the end",
        "group",
        "not utf-8",
    ],
)
def test_what_is_not_onnx_is_refused(tmp_path, content, word):
    path = write(tmp_path, content)
    refused(tmp_path, (), words=(str(path), word, "export the bundle again"))


def test_graphs_nested_without_end_are_refused(tmp_path):
    def wrapped(number, content):
        size, coded = len(content), bytearray()
        while size > 127:
            coded.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2, *coded, size]) + content

    graph = b""
    for _ in range(2000):
        graph = wrapped(
            1, wrapped(5, wrapped(6, graph))
        )  # a graph of a node with an attribute that is a graph
    path = write(tmp_path, wrapped(8, b"\x10\x14") + wrapped(7, graph))
    refused(tmp_path, (), words=(str(path), "not an ONNX file"))


@KEPT
@given(data=st.data())
def test_any_flip_is_accepted_or_refused_and_never_leads_outside(tmp_path, data):
    """Whatever the bytes, nothing but BundleError; what is accepted refers to nothing that is not listed."""
    content = bytearray(model(then_branch(external_tensor("m.onnx_data"))).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path, bytes(content))
    try:
        check_onnx(tmp_path, "unet/model.onnx", ("unet/m.onnx_data",))
    except BundleError as fault:
        assert str(path) in str(fault) and str(fault).isprintable()
        return
    try:
        read = onnx.load_model_from_string(bytes(content))
    except Exception:  # what protobuf itself refuses leads nowhere
        return
    assert {item.domain for item in read.opset_import} <= {"", "ai.onnx"}
    for node in read.graph.node:
        assert node.domain in ("", "ai.onnx")
        for attribute in node.attribute:
            for tensor in attribute.g.initializer:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                assert entries.get("location", "m.onnx_data") == "m.onnx_data"


@KEPT
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path, content):
    write(tmp_path, content)
    refused(tmp_path, ("unet/m.onnx_data",))
