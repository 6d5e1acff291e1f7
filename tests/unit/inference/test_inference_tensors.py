"""Tensors between the wire and memory, and what is refused on the way."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from services.inference.tensors import DATATYPES, Answers, Outputs, Signature, TensorSpec, stream_answer
from services.resilience.errors import BadInput
from tenfold.inference.v2 import inference_pb2 as pb


def spec(name: str, datatype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, DATATYPES[datatype], shape)


def signature(*inputs: TensorSpec, max_batch: int = 8) -> Signature:
    return Signature(inputs, [spec("y", "FP32", -1, 2), spec("label", "BYTES", -1)], max_batch)


TWO = signature(spec("a", "FP32", -1, 2), spec("b", "INT8", -1, 3))


def raw(*tensors: tuple[str, str, list[int], bytes]) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[data for *_, data in tensors])
    for name, datatype, shape, _ in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
    return request


def typed(name: str, datatype: str, shape: list[int], **contents: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name=name, datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents))
    return request


def packed(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def test_raw_tensors_are_taken_in_any_order() -> None:
    a, b = np.array([[1, 2]], np.float32), np.array([[3, -4, 5]], np.int8)
    request = raw(("b", "INT8", [1, 3], b.tobytes()), ("a", "FP32", [1, 2], a.tobytes()))
    feeds = TWO.feeds([TWO.decode(request)])
    np.testing.assert_array_equal(feeds["a"], a)
    np.testing.assert_array_equal(feeds["b"], b)


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BYTES"])
def test_every_fixed_size_type_travels_raw(datatype: str) -> None:
    kind = DATATYPES[datatype]
    only = signature(spec("x", datatype, -1, 3))
    values = np.array([[0, 1, 1]], kind.dtype)
    feeds = only.feeds([only.decode(raw(("x", datatype, [1, 3], values.tobytes())))])
    assert feeds["x"].dtype == kind.dtype
    np.testing.assert_array_equal(feeds["x"], values)


@pytest.mark.parametrize("datatype", [name for name, kind in DATATYPES.items() if kind.contents and name != "BYTES"])
def test_every_type_with_typed_contents_takes_them(datatype: str) -> None:
    kind = DATATYPES[datatype]
    only = signature(spec("x", datatype, -1, 3))
    feeds = only.feeds([only.decode(typed("x", datatype, [1, 3], **{kind.contents: [0, 1, 1]}))])
    np.testing.assert_array_equal(feeds["x"], np.array([[0, 1, 1]], kind.dtype))


@pytest.mark.parametrize("how", ["raw", "typed"])
def test_bytes_are_text_and_join_a_batch(how: str) -> None:
    only = signature(spec("x", "BYTES", -1, 2))
    values = ["a", "", "é", "0\0"]

    def request(pair: list[str]) -> pb.ModelInferRequest:
        data = [value.encode() for value in pair]
        if how == "raw":
            return raw(("x", "BYTES", [1, 2], packed(*data)))
        return typed("x", "BYTES", [1, 2], bytes_contents=data)

    feeds = only.feeds([only.decode(request(values[:2])), only.decode(request(values[2:]))])
    assert feeds["x"].tolist() == [values[:2], values[2:]]


def test_requests_of_several_rows_join_in_order() -> None:
    only = signature(spec("x", "FP32", -1, 2))
    rows = [np.full((n, 2), n, np.float32) for n in (1, 3, 2)]
    feeds = only.feeds([only.decode(raw(("x", "FP32", list(r.shape), r.tobytes()))) for r in rows])
    np.testing.assert_array_equal(feeds["x"], np.concatenate(rows))


def test_free_inner_dimensions_are_told_apart() -> None:
    only = signature(spec("x", "FP32", -1, -1))
    short = only.decode(raw(("x", "FP32", [1, 2], bytes(8))))
    long = only.decode(raw(("x", "FP32", [1, 3], bytes(12))))
    assert short.shapes != long.shapes


def test_nan_is_a_value() -> None:
    only = signature(spec("x", "FP32", -1, 1))
    nan = np.array([[np.nan]], np.float32)
    assert np.isnan(only.feeds([only.decode(raw(("x", "FP32", [1, 1], nan.tobytes())))])["x"]).all()


A, B = ("a", "FP32", [1, 2], bytes(8)), ("b", "INT8", [1, 3], bytes(3))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (raw(A, A), "inputs[1].name: 'a' is there twice; b: this input is missing"),
        (raw(A), "b: this input is missing"),
        (raw(A, B, ("c", "FP32", [1], bytes(4))), "inputs[2].name: must be one of a, b, got 'c'"),
        (raw(A, A, B), "inputs[1].name: 'a' is there twice"),
        (raw(A, ("b", "FP32", [1, 3], bytes(12))), "b.datatype: must be INT8, got 'FP32'"),
        (raw(A, ("b", "INT8", [1, 4], bytes(4))), "b.shape: must be [-1, 3] where -1 is any, got [1, 4]"),
        (raw(A, ("b", "INT8", [3], bytes(3))), "b.shape: must be [-1, 3] where -1 is any, got [3]"),
        (raw(A, ("b", "INT8", [2, 3], bytes(6))), "b.shape: must have as many rows as a has 1, got 2"),
        (raw(("a", "FP32", [0, 2], b""), ("b", "INT8", [0, 3], b"")), "a.shape: must have at least 1 in every"),
        (raw(("a", "FP32", [-1, 2], b""), B), "a.shape: must have at least 1 in every dimension, got [-1, 2]"),
        (
            raw(("a", "FP32", [9, 2], bytes(72)), ("b", "INT8", [9, 3], bytes(27))),
            "a.shape: must have at most 8 rows, got 9",
        ),
        (
            raw(("a", "FP32", [1, 2], bytes(7)), B),
            "a.raw_input_contents: must be 8 bytes for 2 values of FP32, got 7",
        ),
        (
            raw(("a", "FP32", [2**62, 2], bytes(8)), B),
            f"a.raw_input_contents: must be {2**65} bytes for {2**63} values of FP32, got 8",
        ),
    ],
)
def test_a_bad_request_is_told_what_was_wrong(request_: pb.ModelInferRequest, message: str) -> None:
    TWO.decode(raw(A, B))  # one that is right must not make its neighbours look right
    with pytest.raises(BadInput) as caught:
        TWO.decode(request_)
    assert message in str(caught.value)


def test_a_request_like_one_before_is_decoded_from_its_own_bytes() -> None:
    only = signature(spec("x", "FP32", -1, 2))
    for rows in (1, 2, 1, 2):
        values = np.random.default_rng(rows).standard_normal((rows, 2), np.float32)
        inputs = only.decode(raw(("x", "FP32", [rows, 2], values.tobytes())))
        assert inputs.rows == rows
        np.testing.assert_array_equal(only.feeds([inputs])["x"], values)


def test_every_wrong_tensor_is_named() -> None:
    with pytest.raises(BadInput) as caught:
        TWO.decode(raw(("a", "FP64", [1, 2], bytes(16)), ("b", "INT8", [1, 9], bytes(9))))
    assert [violation.field for violation in caught.value.violations] == ["a.datatype", "b.shape"]


def test_raw_and_typed_contents_exclude_each_other() -> None:
    TWO.decode(raw(A, B))
    request = raw(A, B)
    request.inputs[0].contents.fp32_contents.extend([1, 2])
    with pytest.raises(BadInput, match=r"a\.contents: must be empty where raw_input_contents is used"):
        TWO.decode(request)


def test_there_is_one_raw_buffer_for_each_input() -> None:
    request = raw(A, B)
    del request.raw_input_contents[1]
    with pytest.raises(BadInput, match="raw_input_contents: must have one entry for each of the 2 inputs, got 1"):
        TWO.decode(request)


@pytest.mark.parametrize(
    ("datatype", "request_", "message"),
    [
        ("FP32", typed("x", "FP32", [1, 2], fp32_contents=[1]), "must have 2 values for its shape, got 1"),
        ("FP32", typed("x", "FP32", [1, 2], fp64_contents=[1, 2]), "x.contents.fp64_contents: must be empty"),
        ("INT8", typed("x", "INT8", [1, 2], int_contents=[1, 128]), "must be from -128 to 127 for INT8, got 128"),
        ("FP16", typed("x", "FP16", [1, 2], fp32_contents=[1, 2]), "FP16 has no typed contents"),
        ("BOOL", raw(("x", "BOOL", [1, 2], b"\x00\x02")), "must hold 0 or 1 in every byte of BOOL, got 2"),
        ("BYTES", raw(("x", "BYTES", [1, 2], packed(b"a"))), "must hold 2 values of BYTES for its shape, got 1"),
        ("BYTES", raw(("x", "BYTES", [1, 2], b"\xff\xff\xff\xff")), "value 0 of BYTES ends after the buffer's 4"),
        ("BYTES", raw(("x", "BYTES", [1, 2], packed(b"a") + b"\x01")), "value 1 of BYTES ends after the buffer's 6"),
        ("BYTES", raw(("x", "BYTES", [1, 2], packed(b"a", b"\xff"))), "value 1 of BYTES must be UTF-8 text"),
    ],
)
def test_bad_contents_are_told_what_was_wrong(datatype: str, request_: pb.ModelInferRequest, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        signature(spec("x", datatype, -1, 2)).decode(request_)
    assert message in str(caught.value)


def test_shared_memory_is_refused_rather_than_read_as_empty() -> None:
    request = pb.ModelInferRequest()
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2]).parameters["shared_memory_region"].string_param = "r"
    with pytest.raises(BadInput, match="does not offer shared memory"):
        signature(spec("x", "FP32", -1, 2)).decode(request)


def test_an_answer_is_what_protobuf_would_have_written() -> None:
    outputs = Outputs(TWO, [np.arange(6, dtype=np.float32).reshape(3, 2), np.array(["a", "é", ""], object)], 3)
    long_id = "x" * 300
    encoded = Answers("model", "7", TWO).encode(outputs, 1, 2, (0, 1), long_id)
    answer = pb.ModelInferResponse.FromString(encoded)
    assert (answer.model_name, answer.model_version, answer.id) == ("model", "7", long_id)
    assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [
        ("y", "FP32", [2, 2]),
        ("label", "BYTES", [2]),
    ]
    assert list(answer.raw_output_contents) == [
        np.array([2, 3, 4, 5], np.float32).tobytes(),
        packed("é".encode(), b""),
    ]
    streamed = pb.ModelStreamInferResponse.FromString(stream_answer(encoded))
    assert streamed.infer_response == answer


def test_answers_of_other_sizes_do_not_get_each_others_heads() -> None:
    answers = Answers("model", "7", TWO)
    outputs = Outputs(TWO, [np.zeros((3, 2), np.float32), np.array(["a", "b", "c"], object)], 3)
    for start, rows, wanted in ((0, 1, (0,)), (0, 3, (0,)), (1, 1, (1, 0)), (1, 1, (0, 1))):
        answer = pb.ModelInferResponse.FromString(answers.encode(outputs, start, rows, wanted, ""))
        assert [output.name for output in answer.outputs] == [TWO.outputs[place].name for place in wanted]
        assert all(output.shape[0] == rows for output in answer.outputs)


def test_outputs_without_a_row_for_each_row_that_went_in_are_not_split() -> None:
    with pytest.raises(ValueError, match=r"output y has shape \(1, 2\) for a batch of 3"):
        Outputs(TWO, [np.zeros((1, 2), np.float32), np.array(["a"], object)], 3)


def test_outputs_can_be_chosen_by_name() -> None:
    request = pb.ModelInferRequest()
    assert TWO.wanted(request) == (0, 1)
    request.outputs.add(name="label")
    assert TWO.wanted(request) == (1,)
    request.outputs.add(name="z")
    with pytest.raises(BadInput, match=r"outputs\[1\]\.name: must be one of y, label, got 'z'"):
        TWO.wanted(request)
