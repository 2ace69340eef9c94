"""The graph in the packed file: a few hundred bytes, no names, nothing that can be executed.

`FORMAT.md`, section 3, is normative.
"""

import math
import struct
from dataclasses import replace

from quant_ops.byte_stream import ByteReader, put_varint
from quant_ops.errors import UsageError
from quant_ops.graph import Arg, Graph, Layer, Node, ParamRef, Ref, Shape, params_in, refs_in
from quant_ops.operators import LAYER_OPS, OPCODES, OPERATORS

KINDS = ("conv", "conv_transpose", "linear", "embedding", "other")
DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
    "bool", "", "complex64", "complex128",
)  # fmt: skip
KEPT_IN_FLOAT = "it was kept in float when the file was written"

_CONSTANT, _NATURAL, _NEGATIVE, _REF, _PARAM, _TUPLE = range(6)
_NONE, _FALSE, _TRUE, _FLOAT, _DTYPE, _TEXT = range(6)
_DTYPE_PREFIX = "dtype:"
_LOW_BITS, _EXTENDED = 5, 31
_MANY_ARGS = 15
_SAME_SHAPE, _OTHER_DTYPE = 16, 32
_SEARCHABLE, _HAS_BIAS, _HAS_GROUPS = 8, 16, 32
_MAX_TEXT = 64  # an interpolation mode or an einsum equation
_MAX_DEPTH = 4
_MAX_RANK = 15
_MAX_ELEMENTS = 2**40


def param_order(graph: Graph) -> tuple[str, ...]:
    """The graph's parameters in order of first use: parameter number i is the i-th."""
    return tuple(dict.fromkeys(n for node in graph.nodes for a in node.args for n in params_in(a)))


def anonymous(graph: Graph) -> Graph:
    """The same graph with the names a reader gives: nodes n0.., layers l0.., parameters p0.."""
    order = param_order(graph)
    number = {name: f"p{i}" for i, name in enumerate(order)}
    shapes, dtypes = dict(graph.param_shapes), dict(graph.param_dtypes)
    return Graph(
        tuple(
            replace(node, name=f"n{i}", args=tuple(_rename(a, number) for a in node.args))
            for i, node in enumerate(graph.nodes)
        ),
        graph.outputs,
        tuple(
            replace(
                layer,
                name=f"l{i}",
                weight=number[layer.weight],
                bias=number[layer.bias] if layer.bias else None,
                reason="" if layer.searchable else KEPT_IN_FLOAT,
            )
            for i, layer in enumerate(graph.layers)
        ),
        tuple((number[name], shapes[name]) for name in order),
        tuple((number[name], dtypes[name]) for name in order if name in dtypes),
    )


def _rename(arg: Arg, number: dict[str, str]) -> Arg:
    if isinstance(arg, ParamRef):
        return ParamRef(number[arg.name])
    return tuple(_rename(item, number) for item in arg) if isinstance(arg, tuple) else arg


def encode_graph(graph: Graph) -> bytes:
    """The bytes of a folded graph; its `param_shapes` must name every parameter.

    Raises:
        UsageError: an argument that the format cannot hold.
    """
    writer = _GraphWriter(graph)
    return bytes(writer.out)


class _GraphWriter:
    def __init__(self, graph: Graph) -> None:
        self.out = bytearray()
        self._number: dict[str, int] = {}
        put_varint(self.out, len(graph.nodes))
        for index, node in enumerate(graph.nodes):
            self._put_node(graph, index, node)
        shapes, dtypes = dict(graph.param_shapes), dict(graph.param_dtypes)
        for name in self._number:
            self._put_param(shapes[name], dtypes.get(name, "float32"))
        put_varint(self.out, len(graph.layers))
        for layer in graph.layers:
            assert shapes[layer.weight] == layer.weight_shape, layer.name
            self._put_layer(layer)
        put_varint(self.out, len(graph.outputs))
        for ref in graph.outputs:
            put_varint(self.out, ref.index)

    def _put_node(self, graph: Graph, index: int, node: Node) -> None:
        put_varint(self.out, OPCODES[node.op])
        shape, dtype = _inherited(node.args, graph.nodes)
        flags = _SAME_SHAPE * (shape == node.shape) + _OTHER_DTYPE * (dtype != node.dtype)
        self.out.append(flags | min(len(node.args), _MANY_ARGS))
        if len(node.args) >= _MANY_ARGS:
            put_varint(self.out, len(node.args) - _MANY_ARGS)
        for arg in node.args:
            self._put_arg(index, arg, node)
        if dtype != node.dtype:
            self.out.append(_dtype_code(node.dtype, node))
        if shape != node.shape:
            put_varint(self.out, len(node.shape))
            for size in node.shape:
                put_varint(self.out, size)

    def _put_arg(self, index: int, arg: Arg, node: Node) -> None:
        if isinstance(arg, Ref):
            self._put(_REF, index - arg.index - 1)
        elif isinstance(arg, ParamRef):
            n_seen = len(self._number)
            self._put(_PARAM, n_seen - self._number.setdefault(arg.name, n_seen))
        elif isinstance(arg, tuple):
            self._put(_TUPLE, len(arg))
            for item in arg:
                self._put_arg(index, item, node)
        elif isinstance(arg, int) and not isinstance(arg, bool):
            self._put(*((_NATURAL, arg) if arg >= 0 else (_NEGATIVE, -1 - arg)))
        else:
            self._put_constant(arg, node)

    def _put_constant(self, arg: bool | float | str | None, node: Node) -> None:
        if arg is None:
            self._put(_CONSTANT, _NONE)
        elif isinstance(arg, bool):
            self._put(_CONSTANT, _TRUE if arg else _FALSE)
        elif isinstance(arg, float):
            self._put(_CONSTANT, _FLOAT)
            self.out += struct.pack("<d", arg)
        elif arg.startswith(_DTYPE_PREFIX):
            self._put(_CONSTANT, _DTYPE)
            self.out.append(_dtype_code(arg.removeprefix(_DTYPE_PREFIX), node))
        elif not arg.isascii() or len(arg) > _MAX_TEXT:
            raise UsageError(
                f"operator {node.op!r} (node {node.name!r}) has the text argument {arg!r}; "
                f"a packed model holds at most {_MAX_TEXT} ASCII characters"
            )
        else:
            self._put(_CONSTANT, _TEXT)
            put_varint(self.out, len(arg))
            self.out += arg.encode()

    def _put(self, tag: int, value: int) -> None:
        self.out.append(tag << _LOW_BITS | min(value, _EXTENDED))
        if value >= _EXTENDED:
            put_varint(self.out, value - _EXTENDED)

    def _put_param(self, shape: Shape, dtype: str) -> None:
        self.out.append(len(shape) << 4 | DTYPES.index(dtype))
        for size in shape:
            put_varint(self.out, size)

    def _put_layer(self, layer: Layer) -> None:
        flags = _SEARCHABLE * layer.searchable + _HAS_BIAS * (layer.bias is not None)
        self.out.append(KINDS.index(layer.kind) | flags | _HAS_GROUPS * (layer.groups > 1))
        put_varint(self.out, self._number[layer.weight])
        if layer.bias is not None:
            put_varint(self.out, self._number[layer.bias])
        if layer.groups > 1:
            put_varint(self.out, layer.groups)
        put_varint(self.out, layer.macs)
        put_varint(self.out, len(layer.sites))
        previous = 0
        for site in layer.sites:
            put_varint(self.out, site - previous)
            previous = site


def _inherited(args: tuple[Arg, ...], nodes: tuple[Node, ...] | list[Node]) -> tuple[Shape, str]:
    """Shape and type of the first value an operator reads: most operators keep both."""
    first = next(refs_in(args), None)
    return (
        ((), "float32") if first is None else (nodes[first.index].shape, nodes[first.index].dtype)
    )


def _dtype_code(dtype: str, node: Node) -> int:
    if dtype not in DTYPES:
        raise UsageError(
            f"node {node.name!r} has values of type {dtype!r}; a packed model holds "
            f"{', '.join(filter(None, DTYPES))}"
        )
    return DTYPES.index(dtype)


def decode_graph(reader: ByteReader) -> Graph:
    """The graph under the names of `anonymous`; inverse of `encode_graph`.

    Raises:
        VerificationError: bytes that are not a graph of the closed list of operators.
    """
    start = reader.position
    graph = _GraphReader(reader).read()
    if encode_graph(graph) != reader.since(start):
        raise reader.fault("the graph is not written in the shortest form")
    return graph


class _GraphReader:
    def __init__(self, reader: ByteReader) -> None:
        self._reader = reader
        self._nodes: list[Node] = []
        self._n_params = 0

    def read(self) -> Graph:
        for index in range(self._reader.count()):
            self._read_node(index)
        params = [self._read_param() for _ in range(self._n_params)]
        shapes = [shape for shape, _ in params]
        layers = tuple(self._read_layer(i, shapes) for i in range(self._reader.count()))
        if len({layer.weight for layer in layers}) < len(layers):
            raise self._reader.fault("two layers have the same weight")
        n_outputs = self._reader.count()
        outputs = tuple(Ref(self._reader.varint(len(self._nodes))) for _ in range(n_outputs))
        return Graph(
            tuple(self._nodes),
            outputs,
            layers,
            tuple((f"p{i}", shape) for i, shape in enumerate(shapes)),
            tuple((f"p{i}", t) for i, (_, t) in enumerate(params) if t != "float32"),
        )

    def _read_node(self, index: int) -> None:
        reader = self._reader
        op = OPERATORS[reader.varint(len(OPERATORS))]
        flags = reader.byte()
        n_args = flags & _MANY_ARGS
        if n_args == _MANY_ARGS:
            n_args += reader.count()
        if op == "input" and (n_args or any(node.op != "input" for node in self._nodes)):
            raise reader.fault("an input has arguments or comes after an operator")
        args = tuple(self._read_arg(index, 0) for _ in range(n_args))
        shape, dtype = _inherited(args, self._nodes)
        if flags & _OTHER_DTYPE:
            dtype = self._read_dtype()
        if not flags & _SAME_SHAPE:
            shape = self._read_shape(reader.varint(_MAX_RANK + 1))
        self._nodes.append(Node(op, args, f"n{index}", shape, dtype))

    def _read_arg(self, index: int, depth: int) -> Arg:
        reader = self._reader
        byte = reader.byte()
        tag, value = byte >> _LOW_BITS, byte & _EXTENDED
        if value == _EXTENDED:
            value += reader.varint(2**63 - _EXTENDED)
        if tag == _CONSTANT:
            return self._read_constant(value)
        if tag == _NATURAL:
            return value
        if tag == _NEGATIVE:
            return -1 - value
        if tag == _REF and value < index:
            return Ref(index - 1 - value)
        if tag == _PARAM and value <= self._n_params:
            number = self._n_params - value
            self._n_params += value == 0
            return ParamRef(f"p{number}")
        if tag == _TUPLE and value <= reader.remaining and depth < _MAX_DEPTH:
            return tuple(self._read_arg(index, depth + 1) for _ in range(value))
        raise reader.fault(f"argument {byte:#04x} is not one that an operator may have")

    def _read_constant(self, code: int) -> Arg:
        if code in (_NONE, _FALSE, _TRUE):
            return (None, False, True)[code]
        if code == _FLOAT:
            return self._reader.unpack("<d")[0]
        if code == _DTYPE:
            return _DTYPE_PREFIX + self._read_dtype()
        if code != _TEXT:
            raise self._reader.fault(f"constant number {code} does not exist")
        text = bytes(self._reader.take(self._reader.varint(_MAX_TEXT + 1)))
        if not text.isascii() or text.startswith(_DTYPE_PREFIX.encode()):
            raise self._reader.fault("a text argument is not plain ASCII")
        return text.decode("ascii")

    def _read_dtype(self) -> str:
        return DTYPES[self._reader.varint(len(DTYPES))]

    def _read_shape(self, rank: int) -> Shape:
        shape = tuple(self._reader.varint(_MAX_ELEMENTS) for _ in range(rank))
        if math.prod(shape) >= _MAX_ELEMENTS:
            raise self._reader.fault(f"shape {shape} has too many elements")
        return shape

    def _read_param(self) -> tuple[Shape, str]:
        byte = self._reader.byte()
        code = byte & 15
        if code >= len(DTYPES) or not DTYPES[code]:
            raise self._reader.fault(f"parameter type {code} does not exist")
        return self._read_shape(byte >> 4), DTYPES[code]

    def _read_layer(self, index: int, shapes: list[Shape]) -> Layer:
        reader = self._reader
        flags = reader.byte()
        if flags & 7 >= len(KINDS) or flags >= 64:
            raise reader.fault(f"layer kind {flags:#04x} does not exist")
        weight = reader.varint(len(shapes))
        bias = reader.varint(len(shapes)) if flags & _HAS_BIAS else None
        groups = reader.varint(_MAX_ELEMENTS) if flags & _HAS_GROUPS else 1
        macs = reader.varint()
        sites: list[int] = []
        for _ in range(reader.count()):
            sites.append(reader.varint(len(self._nodes)) + (sites[-1] if sites else 0))
        layer = Layer(
            name=f"l{index}",
            kind=KINDS[flags & 7],
            weight=f"p{weight}",
            bias=None if bias is None else f"p{bias}",
            sites=tuple(sites),
            weight_shape=shapes[weight],
            out_channels=_out_channels(KINDS[flags & 7], shapes[weight], groups),
            groups=groups,
            macs=macs,
            searchable=bool(flags & _SEARCHABLE),
            reason="" if flags & _SEARCHABLE else KEPT_IN_FLOAT,
        )
        self._check_layer(layer, shapes[bias] if bias is not None else None)
        return layer

    def _check_layer(self, layer: Layer, bias_shape: Shape | None) -> None:
        in_order = all(a < b for a, b in zip(layer.sites, layer.sites[1:], strict=False))
        if not layer.sites or not in_order or layer.sites[-1] >= len(self._nodes):
            raise self._reader.fault("a layer's operators are not in order")
        nodes = [self._nodes[site] for site in layer.sites]
        if any(layer.weight not in set(params_in(node.args)) for node in nodes):
            raise self._reader.fault("a layer's operator does not use its weight")
        if not layer.searchable:
            return
        sound = (
            layer.kind != "other"
            and layer.groups > 0
            and all(node.op in LAYER_OPS for node in nodes)
            and layer.n_weights > 0
            and layer.out_channels > 0
            and layer.n_weights % layer.out_channels == 0
            and layer.weight_shape[0] % layer.groups == 0
            and bias_shape in (None, (layer.out_channels,))
        )
        if not sound:
            raise self._reader.fault(
                f"a layer's weight of shape {layer.weight_shape} is impossible"
            )


def _out_channels(kind: str, shape: Shape, groups: int) -> int:
    if kind == "conv_transpose":
        return shape[1] * groups if len(shape) > 1 else 0
    return shape[0] if shape else 0
