"""One float operator on its way into an ONNX graph."""

from collections.abc import Callable
from typing import Any

import numpy as np

from quant_ops.graph import Ref
from quant_ops.program import Call, Constant, StepArg
from search.exporters.onnx_graph.builder import Unsupported
from search.exporters.onnx_graph.state import Value, WriterState, argument, int_of


class FloatCall:
    """One call: its arguments as names of values."""

    def __init__(self, state: WriterState, step: Call) -> None:
        self.state = state
        self.step = step
        self.b = state.builder
        self.args = step.args
        self.out_shape = state.graph.nodes[step.out].shape

    def shape(self, position: int = 0) -> tuple[int, ...]:
        """Shape of an argument for a batch of one."""
        arg = self.args[position]
        if isinstance(arg, Ref):
            return self.state.graph.nodes[arg.index].shape
        return arg.array.shape if isinstance(arg, Constant) else ()

    def tensor(self, position: int, default: StepArg = None) -> str:
        """An argument as a value; a plain number as float32, or int64 beside whole numbers."""
        return self.value(argument(self.args, position, default))

    def value(self, arg: StepArg) -> str:
        """As `tensor`, of an argument or of a part of one; codes are turned into numbers."""
        if isinstance(arg, Ref):
            has_codes = self.state.program.codes[arg.index] is not None
            return (self.state.dequantized if has_codes else self.state.value)(arg.index)
        if isinstance(arg, Constant):
            return self.b.constant(arg.array)
        if isinstance(arg, bool | int | float):
            return self.b.constant(np.array(arg, self.dtype()))
        raise Unsupported("one of its arguments is neither a tensor nor a number", "rewrite it")

    def dtype(self) -> Any:
        """That of the first argument that is a value."""
        for arg in self.args:
            if isinstance(arg, Ref):
                dtype = self.state.graph.nodes[arg.index].dtype
                return np.dtype(dtype or "int64")
        return np.dtype("float32")

    def number(self, position: int, default: float) -> float:
        """A plain number among the arguments."""
        arg = argument(self.args, position, default)
        if isinstance(arg, int | float):
            return float(arg)
        raise Unsupported("one of its settings is computed while it runs", "fix it in the model")

    def axis(self, position: int) -> int:
        """An axis, counted from the front."""
        return int_of(self.args[position]) % len(self.shape())

    def put(self, op: str, *inputs: str, **attributes: Any) -> str:
        """One operator."""
        return self.b.node(op, inputs, **attributes)

    def scalar(self, value: float) -> str:
        """A float32 constant."""
        return self.b.constant(np.float32(value))


Put = Callable[[FloatCall], Value]
