"""QuantizedModel -> IntegerProgram: every constant of the integer arithmetic, fixed once."""

from quant_ops.dual import without_unused_layers
from quant_ops.edges import SPLITTING, edge_of, is_pass_through
from quant_ops.graph import Arg, ParamRef, Ref, refs_in
from quant_ops.integer_forms import INTEGER_FORMS, LoweringState, NoIntegerForm
from quant_ops.program import Call, Constant, Input, IntegerProgram, Move, Step, StepArg
from quant_ops.quantized import QuantizedModel


def lower(model: QuantizedModel) -> IntegerProgram:
    """The integer program of a quantized network.

    An operator becomes integer arithmetic where its inputs and its result are quantized and it
    has an integer form; every other one is a float island. Without any activation quantizer the
    whole network runs in float32 with dequantized weights.
    """
    return _Lowering(without_unused_layers(model)).program()


class _Lowering(LoweringState):
    """One pass over the graph in execution order."""

    def program(self) -> IntegerProgram:
        steps: list[Step] = []
        done: set[int] = set()
        for index in range(len(self.nodes)):
            if index not in done:
                step = self._step(index)
                done.add(step.out)
                steps.append(step)
        quantized = {
            name: edge.node
            for name, edge in self.edges.items()
            if name in self.model.activations and self.codes[edge.node] is not None
        }
        outputs = tuple(ref.index for ref in self.graph.outputs)
        return IntegerProgram(tuple(steps), outputs, tuple(self.codes), quantized)

    def _step(self, index: int) -> Step:
        node = self.nodes[index]
        if node.op == "input":
            return self._input(index)
        if self._moves(index):
            return self._move(index)
        build = INTEGER_FORMS.get(node.op)
        try:
            if build is None:
                raise NoIntegerForm("it has no integer form")
            return build(self, index)
        except NoIntegerForm as why:
            return self._call(index, str(why))

    def _input(self, index: int) -> Input:
        self.codes[index] = codes = self.quantizer(self.nodes[index].name)
        name = self.nodes[index].name
        position = self.graph.input_nodes.index(index)
        return Input(out=index, name=name, sources=(), position=position, codes=codes)

    def _moves(self, index: int) -> bool:
        node = self.nodes[index]
        source = node.args[0] if node.args else None
        if not isinstance(source, Ref) or self.codes[source.index] is None:
            return False
        if node.op == "getitem":
            return self.nodes[source.index].op in SPLITTING
        return is_pass_through(self.graph, index)

    def _move(self, index: int) -> Move:
        node = self.nodes[index]
        source = node.args[0]
        assert isinstance(source, Ref)
        codes = self.codes[source.index]
        if edge_of(self.graph, index) is not None:
            self.codes[index] = codes
        assert codes is not None
        return Move(
            out=index,
            name=node.name,
            sources=tuple(ref.index for ref in refs_in(node.args)),
            zero_points=(codes.zero_point,),
            op=node.op,
            args=tuple(self._arg(a) for a in node.args),
        )

    def _call(self, index: int, reason: str) -> Call:
        node = self.nodes[index]
        name = edge_of(self.graph, index)
        if name is not None and self.edges[name].node == index:
            self.codes[index] = self.quantizer(name)
        sources = tuple(ref.index for ref in refs_in(node.args))
        reads_edge = any(edge_of(self.graph, s) is not None for s in sources)
        is_island = name is not None or (reads_edge and node.op != "sym_size.int")
        return Call(
            out=index,
            name=node.name,
            sources=sources,
            op=node.op,
            args=tuple(self._arg(a) for a in node.args),
            codes=self.codes[index],
            reason=reason if is_island else "",
        )

    def _arg(self, arg: Arg) -> StepArg:
        if isinstance(arg, ParamRef):
            return Constant(self.params[arg.name].detach().numpy())
        if isinstance(arg, tuple):
            return tuple(self._arg(item) for item in arg)
        return arg
