"""Tensors on the wire and in memory.

A request's tensors are checked here, before they join a batch, so that one bad input fails alone. Inside they are raw
little-endian bytes: a batch is one join and one view, an answer one slice behind a head that was encoded before.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.resilience.errors import BadInput, Violation
from tenfold.inference.v2 import inference_pb2 as pb

Array = NDArray[Any]
Shape = tuple[int, ...]
Value = bytes | Array
"""One input of one request: its raw bytes, or an object array of str for BYTES."""

HEADS_KEPT = 512  # distinct answer shapes whose encoding is remembered, per model
PLANS_KEPT = 512  # distinct input shapes that are known to be right, per model
BYTES_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class DataType:
    """name: in the protocol. dtype: in memory; BF16 travels as its 16 bits, BYTES as objects of str.

    contents: the field of InferTensorContents that holds it, empty where only raw bytes can.
    """

    name: str
    dtype: np.dtype[Any]
    contents: str
    config: int


def _table() -> Mapping[str, DataType]:
    rows = (
        ("BOOL", "?", "bool_contents", pb.TYPE_BOOL),
        ("UINT8", "<u1", "uint_contents", pb.TYPE_UINT8),
        ("UINT16", "<u2", "uint_contents", pb.TYPE_UINT16),
        ("UINT32", "<u4", "uint_contents", pb.TYPE_UINT32),
        ("UINT64", "<u8", "uint64_contents", pb.TYPE_UINT64),
        ("INT8", "<i1", "int_contents", pb.TYPE_INT8),
        ("INT16", "<i2", "int_contents", pb.TYPE_INT16),
        ("INT32", "<i4", "int_contents", pb.TYPE_INT32),
        ("INT64", "<i8", "int64_contents", pb.TYPE_INT64),
        ("FP16", "<f2", "", pb.TYPE_FP16),
        ("FP32", "<f4", "fp32_contents", pb.TYPE_FP32),
        ("FP64", "<f8", "fp64_contents", pb.TYPE_FP64),
        ("BF16", "<u2", "", pb.TYPE_BF16),
        ("BYTES", "O", "bytes_contents", pb.TYPE_STRING),
    )
    return {name: DataType(name, np.dtype(dtype), contents, config) for name, dtype, contents, config in rows}


DATATYPES = _table()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model. shape: -1 where any number is allowed; the batch dimension included."""

    name: str
    datatype: DataType
    shape: Shape


@dataclass(slots=True)
class Inputs:
    """The inputs of one request, checked, in the model's order.

    rows: how many places of a batch they take; 1 for a model that does not batch.
    shapes: of each input, without the batch dimension where the model batches. Requests join only where these agree.
    """

    rows: int
    shapes: tuple[Shape, ...]
    values: list[Value]


class Plan(NamedTuple):
    """What is known of a tensor with a certain name, type and shape, once one like it was found right."""

    place: int
    rows: int
    inner: Shape
    raw_bytes: int


class Signature:
    """What goes into a model and what comes out."""

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], max_batch: int) -> None:
        """max_batch: rows of one request, and of one run; 0 for a model whose first dimension is not a batch."""
        self.inputs, self.outputs, self.max_batch = tuple(inputs), tuple(outputs), max_batch
        self._input_at = {spec.name: at for at, spec in enumerate(self.inputs)}
        self._output_at = {spec.name: at for at, spec in enumerate(self.outputs)}
        self._all_outputs = tuple(range(len(self.outputs)))
        self._plans: dict[tuple[str, str, Shape], Plan] = {}

    def decode(self, request: pb.ModelInferRequest) -> Inputs:
        """The request's tensors. Raises BadInput naming every one that is wrong."""
        return self._decode_known(request) or self._decode_carefully(request)

    def _decode_known(self, request: pb.ModelInferRequest) -> Inputs | None:
        """The usual request, whose like was found right before, for a third of the time; None for any other."""
        tensors, raws = request.inputs, request.raw_input_contents
        count = len(self.inputs)
        if len(tensors) != count or len(raws) != count:
            return None
        shapes: list[Shape] = [()] * count
        values: list[Value] = [b""] * count
        rows = 0
        for tensor, raw in zip(tensors, raws, strict=True):
            plan = self._plans.get((tensor.name, tensor.datatype, tuple(tensor.shape)))
            if plan is None or len(raw) != plan.raw_bytes or values[plan.place] or rows not in (0, plan.rows):
                return None
            if tensor.HasField("contents") or tensor.parameters:
                return None
            rows, shapes[plan.place], values[plan.place] = plan.rows, plan.inner, raw
        return Inputs(rows, tuple(shapes), values) if rows else None

    def _remember(self, inputs: Inputs) -> None:
        """Values of BYTES and BOOL are looked at one by one, so a request with such is never the usual one."""
        if len(self._plans) >= PLANS_KEPT:
            self._plans.clear()
        for at, (spec, inner) in enumerate(zip(self.inputs, inputs.shapes, strict=True)):
            if spec.datatype.name not in ("BYTES", "BOOL"):
                shape = (inputs.rows, *inner) if self.max_batch else inner
                raw_bytes = math.prod(shape) * spec.datatype.dtype.itemsize
                self._plans[spec.name, spec.datatype.name, shape] = Plan(at, inputs.rows, inner, raw_bytes)

    def _decode_carefully(self, request: pb.ModelInferRequest) -> Inputs:
        tensors, raws = request.inputs, request.raw_input_contents
        if raws and len(raws) != len(tensors):
            wanted = f"must have one entry for each of the {len(tensors)} inputs, got {len(raws)}"
            raise BadInput(Violation("raw_input_contents", wanted))
        shapes: list[Shape | None] = [None] * len(self.inputs)
        values: list[Value] = [b""] * len(self.inputs)
        problems: list[Violation] = []
        for at, tensor in enumerate(tensors):
            name = tensor.name
            index = self._input_at.get(name, -1)
            if index < 0:
                allowed = ", ".join(self._input_at)
                problems.append(Violation(f"inputs[{at}].name", f"must be one of {allowed}, got {name!r}"))
            elif shapes[index] is not None:
                problems.append(Violation(f"inputs[{at}].name", f"{name!r} is there twice"))
            else:
                shapes[index] = shape = tuple(tensor.shape)
                try:
                    count = _check_shape(self.inputs[index], tensor.datatype, shape)
                    values[index] = _value(self.inputs[index].datatype, tensor, raws[at] if raws else None, count)
                except _Wrong as wrong:
                    problems.append(Violation(f"{name}.{wrong.field}", wrong.description))
        problems += [
            Violation(spec.name, "this input is missing")
            for spec, shape in zip(self.inputs, shapes, strict=True)
            if shape is None
        ]
        if problems:
            raise BadInput(*problems)
        inputs = self._inputs([shape for shape in shapes if shape is not None], values)
        self._remember(inputs)
        return inputs

    def wanted(self, request: pb.ModelInferRequest) -> tuple[int, ...]:
        """Which outputs are asked for, as places in `outputs`; all of them where none is named. Raises BadInput."""
        if not request.outputs:
            return self._all_outputs
        places = []
        for at, output in enumerate(request.outputs):
            place = self._output_at.get(output.name)
            if place is None:
                allowed = ", ".join(self._output_at)
                raise BadInput(Violation(f"outputs[{at}].name", f"must be one of {allowed}, got {output.name!r}"))
            for key in ("shared_memory_region", "classification"):
                if key in output.parameters:
                    raise BadInput(Violation(f"{output.name}.parameters.{key}", "this server does not offer it"))
            places.append(place)
        return tuple(places)

    def feeds(self, batch: Sequence[Inputs]) -> dict[str, Array]:
        """The arrays of one run over requests of equal `shapes`, in order."""
        first = batch[0]
        feeds: dict[str, Array] = {}
        rows = sum(member.rows for member in batch)
        for at, spec in enumerate(self.inputs):
            shape = (rows, *first.shapes[at]) if self.max_batch else first.shapes[at]
            values = [member.values[at] for member in batch]
            feeds[spec.name] = _joined(values, spec.datatype.dtype).reshape(shape)
        return feeds

    def _inputs(self, shapes: list[Shape], values: list[Value]) -> Inputs:
        if not self.max_batch:
            return Inputs(1, tuple(shapes), values)
        rows = shapes[0][0]
        for spec, shape in zip(self.inputs, shapes, strict=True):
            if shape[0] != rows:
                first = f"{self.inputs[0].name} has {rows}"
                raise BadInput(Violation(f"{spec.name}.shape", f"must have as many rows as {first}, got {shape[0]}"))
        if rows > self.max_batch:
            what = f"must have at most {self.max_batch} rows, got {rows}"
            raise BadInput(Violation(f"{self.inputs[0].name}.shape", what))
        return Inputs(rows, tuple(shape[1:] for shape in shapes), values)


class Outputs:
    """What one run produced for its whole batch; members take their rows from it."""

    __slots__ = ("_bytes_per_row", "arrays", "flats", "inner", "rows")

    def __init__(self, signature: Signature, arrays: Sequence[Array], rows: int) -> None:
        """Raises ValueError where an output does not have one row for each row that went in."""
        batched = signature.max_batch > 0
        for spec, array in zip(signature.outputs, arrays, strict=True):
            if batched and (not array.ndim or len(array) != rows):
                raise ValueError(f"output {spec.name} has shape {array.shape} for a batch of {rows}")
        self.rows = rows if batched else 1
        self.arrays = [np.ascontiguousarray(array) for array in arrays]
        self.inner: tuple[Shape, ...] = tuple(array.shape[1:] if batched else array.shape for array in arrays)
        self.flats = [b"" if array.dtype.hasobject else _flat(array) for array in self.arrays]
        self._bytes_per_row = [array.nbytes // self.rows for array in arrays]

    def raw(self, place: int, start: int, rows: int) -> bytes | memoryview:
        """The bytes of `rows` rows of an output from row `start`; a view unless they are BYTES."""
        array = self.arrays[place]
        if array.dtype.hasobject:
            return _packed(array[start : start + rows] if self.rows > 1 else array)
        each = self._bytes_per_row[place]
        return self.flats[place][start * each : (start + rows) * each]


def _flat(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


class Answers:
    """Encodes ModelInferResponse of one model version.

    All but the id and the tensors' bytes is the same from answer to answer, so it is encoded once for each shape.
    That makes an answer ten times cheaper than building and serialising the message.
    """

    def __init__(self, name: str, version: str, signature: Signature) -> None:
        self._name, self._version, self._signature = name, version, signature
        self._heads: dict[tuple[object, ...], bytes] = {}

    def encode(self, outputs: Outputs, start: int, rows: int, wanted: Sequence[int], request_id: str) -> bytes:
        """A serialized ModelInferResponse with `rows` rows of the outputs in `wanted`, from row `start`."""
        key = (rows, outputs.inner, wanted)
        parts: list[bytes | memoryview] = [self._heads.get(key) or self._make_head(key, outputs.inner, rows, wanted)]
        if request_id:
            text = request_id.encode()
            parts += (b"\x1a" + _varint(len(text)), text)  # field 3, id
        for place in wanted:
            raw = outputs.raw(place, start, rows)
            parts += (b"\x32" + _varint(len(raw)), raw)  # field 6, raw_output_contents
        return b"".join(parts)

    def _make_head(self, key: tuple[object, ...], inner: Sequence[Shape], rows: int, wanted: Sequence[int]) -> bytes:
        head = pb.ModelInferResponse(model_name=self._name, model_version=self._version)
        for place in wanted:
            spec = self._signature.outputs[place]
            shape = (rows, *inner[place]) if self._signature.max_batch else inner[place]
            head.outputs.add(name=spec.name, datatype=spec.datatype.name, shape=shape)
        if len(self._heads) >= HEADS_KEPT:
            self._heads.clear()
        encoded = self._heads[key] = bytes(head.SerializeToString())
        return encoded


def stream_answer(answer: bytes) -> bytes:
    """A serialized ModelStreamInferResponse around a serialized ModelInferResponse."""
    return b"".join((b"\x12", _varint(len(answer)), answer))  # field 2, infer_response


class _Wrong(Exception):
    """What is wrong with one field of one tensor."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(description)
        self.field, self.description = field, description


def _check_shape(spec: TensorSpec, datatype: str, shape: Shape) -> int:
    """The number of values in a tensor of this shape."""
    if datatype != spec.datatype.name:
        raise _Wrong("datatype", f"must be {spec.datatype.name}, got {datatype!r}")
    if len(shape) != len(spec.shape) or any(
        have != want and want != -1 for have, want in zip(shape, spec.shape, strict=True)
    ):
        raise _Wrong("shape", f"must be {list(spec.shape)} where -1 is any, got {list(shape)}")
    if shape and min(shape) < 1:
        raise _Wrong("shape", f"must have at least 1 in every dimension, got {list(shape)}")
    return math.prod(shape)


def _value(kind: DataType, tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None, count: int) -> Value:
    if tensor.parameters and "shared_memory_region" in tensor.parameters:
        raise _Wrong("parameters.shared_memory_region", "this server does not offer shared memory")
    if raw is None:
        return _typed(kind, tensor.contents, count)
    if tensor.HasField("contents"):
        raise _Wrong("contents", "must be empty where raw_input_contents is used")
    if kind.dtype.hasobject:
        return _unpacked(raw, count)
    if len(raw) != count * kind.dtype.itemsize:
        wanted = f"must be {count * kind.dtype.itemsize} bytes for {count} values of {kind.name}, got {len(raw)}"
        raise _Wrong("raw_input_contents", wanted)
    if kind.name == "BOOL" and max(raw) > 1:  # any other byte is undefined behaviour further down
        raise _Wrong("raw_input_contents", f"must hold 0 or 1 in every byte of BOOL, got {max(raw)}")
    return raw


def _typed(kind: DataType, contents: pb.InferTensorContents, count: int) -> Value:
    if not kind.contents:
        raise _Wrong("contents", f"{kind.name} has no typed contents: use raw_input_contents")
    if others := [field.name for field, _ in contents.ListFields() if field.name != kind.contents]:
        raise _Wrong(f"contents.{others[0]}", f"must be empty: {kind.name} travels in {kind.contents}")
    values = getattr(contents, kind.contents)
    if len(values) != count:
        raise _Wrong(f"contents.{kind.contents}", f"must have {count} values for its shape, got {len(values)}")
    if kind.dtype.hasobject:
        return _texts([bytes(value) for value in values])
    if kind.dtype.kind in "iu":
        limits = np.iinfo(kind.dtype)
        low, high = min(values), max(values)
        if low < limits.min or high > limits.max:
            wrong = low if low < limits.min else high
            what = f"must be from {limits.min} to {limits.max} for {kind.name}, got {wrong}"
            raise _Wrong(f"contents.{kind.contents}", what)
    return np.array(values, kind.dtype).tobytes()


def _joined(values: Sequence[Value], dtype: np.dtype[Any]) -> Array:
    if dtype.hasobject:
        return np.concatenate([value.reshape(-1) for value in values if isinstance(value, np.ndarray)])
    whole = values[0] if len(values) == 1 else b"".join(values)  # type: ignore[arg-type]  # bytes, as dtype says
    return np.frombuffer(whole, dtype)


def _unpacked(raw: bytes, count: int) -> Array:
    """BYTES as they travel: each value behind its length in 4 bytes."""
    values: list[bytes] = []
    at = 0
    while at < len(raw):
        end = at + 4 + BYTES_LENGTH.unpack_from(raw, at)[0] if at + 4 <= len(raw) else len(raw) + 1
        if end > len(raw):
            raise _Wrong("raw_input_contents", f"value {len(values)} of BYTES ends after the buffer's {len(raw)} bytes")
        values.append(raw[at + 4 : end])
        at = end
    if len(values) != count:
        raise _Wrong("raw_input_contents", f"must hold {count} values of BYTES for its shape, got {len(values)}")
    return _texts(values)


def _packed(values: Array) -> bytes:
    encoded = [str(value).encode() for value in values.reshape(-1)]
    return b"".join(part for value in encoded for part in (BYTES_LENGTH.pack(len(value)), value))


def _texts(values: Sequence[bytes]) -> Array:
    texts = np.empty(len(values), object)
    for at, value in enumerate(values):
        try:
            texts[at] = value.decode()
        except UnicodeDecodeError as error:
            raise _Wrong(
                "contents", f"value {at} of BYTES must be UTF-8 text: {error.reason} at {error.start}"
            ) from None
    return texts


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _SHORT[number]
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


_SHORT = [bytes((number,)) for number in range(0x80)]
