"""Runs a graph in torch, on any parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quant_ops.graph import Arg, Graph, ParamRef, Params, Ref
from quant_ops.operators import implementation

Transform = Callable[[Tensor], Tensor]
_DTYPE_PREFIX = "dtype:"


class Executor:
    """Executes a graph operator by operator and frees each value after its last use.

    One executor serves every quantized version of a network: parameters come with the call.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._steps = [
            None if node.op == "input" else (implementation(node.op), node.args)
            for node in graph.nodes
        ]
        outputs = {ref.index for ref in graph.outputs}
        self._last_use = [
            -1 if i in outputs else max(users, default=i) for i, users in enumerate(graph.consumers)
        ]
        self._frees: list[list[int]] = [[] for _ in graph.nodes]
        for index, last in enumerate(self._last_use):
            if last >= 0:
                self._frees[last].append(index)

    def __call__(self, params: Params, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs in the order of `graph.outputs`. Inputs: (batch, ...) each."""
        return self.run(params, inputs)[0]

    def run(
        self,
        params: Params,
        inputs: Sequence[Tensor],
        *,
        transforms: Mapping[int, Transform] | None = None,
        keep: Sequence[int] = (),
        start: int = 0,
        values: Mapping[int, Tensor] | None = None,
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        """Outputs, and the values of the nodes in `keep`.

        Args:
            params: parameter name to tensor.
            inputs: one tensor per input node, batch first.
            transforms: node index to a function applied to its value (fake quantization).
            keep: node indices whose (transformed) values are returned.
            start: first node to compute; values of earlier nodes are taken from `values`.
            values: node index to value, for every value that nodes from `start` on still read.
        """
        with torch.inference_mode():
            return self._run(params, inputs, transforms or {}, frozenset(keep), start, values or {})

    def apply(
        self, params: Params, inputs: Sequence[Tensor], transforms: Mapping[int, Transform]
    ) -> tuple[Tensor, ...]:
        """Outputs; differentiable where the caller has gradients enabled."""
        return self._run(params, inputs, transforms, frozenset(), 0, {})[0]

    def run_with_grad(
        self, params: Params, inputs: Sequence[Tensor], transforms: Mapping[int, Transform]
    ) -> tuple[Tensor, ...]:
        """Outputs, differentiable with respect to `params` and whatever `transforms` hold."""
        with torch.enable_grad():
            return self._run(params, inputs, transforms, frozenset(), 0, {})[0]

    def compute(self, index: int, params: Params, values: Mapping[int, Tensor]) -> Any:
        """The value of one node from those it reads."""
        step = self._steps[index]
        assert step is not None
        function, args = step
        return function(*(_resolve(arg, values, params) for arg in args))

    def live_values(self, start: int) -> tuple[int, ...]:
        """Nodes before `start` whose values are read by nodes from `start` on, or are outputs."""
        return tuple(
            i for i, last in enumerate(self._last_use) if i < start and (last >= start or last < 0)
        )

    def _run(
        self,
        params: Params,
        inputs: Sequence[Tensor],
        transforms: Mapping[int, Transform],
        keep: frozenset[int],
        start: int,
        values: Mapping[int, Tensor],
    ) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
        env: dict[int, Any] = dict(values)
        kept: dict[int, Tensor] = {}
        feed = iter(inputs)
        for index, step in enumerate(self._steps):
            if step is None:
                value = next(feed)
                if index < start:
                    env.setdefault(index, value)
                    continue
            elif index < start:
                continue
            else:
                function, args = step
                value = function(*(_resolve(arg, env, params) for arg in args))
            if index in transforms:
                value = transforms[index](value)
            env[index] = value
            if index in keep:
                kept[index] = value
            for dead in self._frees[index]:
                env.pop(dead, None)
        return tuple(env[ref.index] for ref in self.graph.outputs), kept


def _resolve(arg: Arg, env: Mapping[int, Any], params: Params) -> Any:
    if isinstance(arg, Ref):
        return env[arg.index]
    if isinstance(arg, ParamRef):
        return params[arg.name]
    if isinstance(arg, tuple):
        return [_resolve(item, env, params) for item in arg]
    if isinstance(arg, str) and arg.startswith(_DTYPE_PREFIX):
        return getattr(torch, arg.removeprefix(_DTYPE_PREFIX))
    return arg
