"""Refuses ONNX files that no export of ours is: damaged, reaching outside, absurd."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from quant_ops.errors import VerificationError
from search.exporters.onnx_graph.builder import OWN_DOMAIN, RUNTIME_DOMAIN

_DOMAINS = {"", "ai.onnx", OWN_DOMAIN, RUNTIME_DOMAIN}
_RUNTIME_OPERATORS = {"MatMulNBits"}
_LARGEST_TENSOR = 2**31  # elements
_TAKES_SHAPE = {"Expand": 1, "Reshape": 1, "ConstantOfShape": 0, "Tile": 1}
_LARGEST_FILE = 2**31 - 1


def require_sound(content: bytes, path: Path) -> None:
    """Check structure, domains, shapes, and that nothing lies outside the file.

    Raises:
        VerificationError: in one sentence.
    """
    if len(content) > _LARGEST_FILE:
        raise VerificationError(f"{path} is larger than an ONNX file can be; export it again")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's own exceptions
        raise VerificationError(
            f"{path} is not an ONNX model ({type(error).__name__}): it is cut short or of another "
            f"kind; copy or export it again"
        ) from error
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise VerificationError(f"{path} refers to data outside the file; it is no export")
        if any(n < 0 for n in tensor.dims) or math.prod(tensor.dims) > _LARGEST_TENSOR:
            raise VerificationError(f"{path} claims a tensor of shape {list(tensor.dims)}")
    for node in _nodes(model):
        own = node.domain == RUNTIME_DOMAIN and node.op_type not in _RUNTIME_OPERATORS
        if node.domain not in _DOMAINS or own:
            raise VerificationError(
                f"{path} holds the operator {node.domain}.{node.op_type}, which no export holds"
            )
    _require_modest_shapes(model, path)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError, and what protobuf raises
        said = str(error).splitlines() or ["no reason given"]
        raise VerificationError(f"{path} is not a sound ONNX model: {said[0]}") from error


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in _nodes(model):
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors


def _require_modest_shapes(model: onnx.ModelProto, path: Path) -> None:
    """Shapes that are made at load; a small file must not ask for all memory."""
    known = {x.name: x for x in model.graph.initializer if x.data_type == TensorProto.INT64}
    for node in model.graph.node:
        position = _TAKES_SHAPE.get(node.op_type)
        if position is None or len(node.input) <= position:
            continue
        shape = known.get(node.input[position])
        if shape is None:
            continue
        try:
            sizes = np.abs(numpy_helper.to_array(shape).astype(np.float64))
        except (ValueError, TypeError) as error:
            raise VerificationError(f"{path} holds a tensor whose size lies: {error}") from error
        if float(np.prod(np.maximum(sizes, 1))) > _LARGEST_TENSOR:
            raise VerificationError(f"{path} asks for a tensor of shape {sizes.tolist()}")
