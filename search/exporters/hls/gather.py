"""A layer that hls4ml does not have: wires. Slices, padding, transpositions, windows are all it.

hls4ml pads, transposes and crops images, each with rules of its own for axes, and has no slice. A
convolution with a 1 among zeros would bring types and products for what costs nothing.
"""

from functools import cache
from pathlib import Path

HEADER = "nnet_gather.h"
# A table inside `from` would be one for all libraries of a process with a layer of this number.
CONFIG = """static const int config{index}_from[{n_out}] = {{{table}}};
struct config{index} {{
    static const unsigned n_in = {n_in};
    static const unsigned n_out = {n_out};
    static int from(int i) {{ return config{index}_from[i]; }}
}};
"""
CALL = "nnet::gather<{input_t}, {output_t}, {config}>({input}, {output});"


@cache
def register_gather(backend_name: str) -> None:
    """Make hls4ml know the layer Gather: `positions` in the flat input, negative for 0."""
    from hls4ml.backends import get_backend
    from hls4ml.backends.template import FunctionCallTemplate, LayerConfigTemplate
    from hls4ml.model.layers import Layer, register_layer

    class Gather(Layer):  # type: ignore[misc]
        def initialize(self) -> None:
            self.add_output_variable(self.get_attr("shape"))

    class Config(LayerConfigTemplate):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(Gather)

        def format(self, node: Layer) -> str:
            positions = node.get_attr("positions").tolist()
            return CONFIG.format(
                index=node.index,
                n_in=node.get_input_variable().size(),
                n_out=len(positions),
                table=", ".join(map(str, positions)),
            )

    class Call(FunctionCallTemplate):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(Gather, include_header=[f"nnet_utils/{HEADER}"])

        def format(self, node: Layer) -> str:
            return CALL.format(**self._default_function_params(node))

    register_layer("Gather", Gather)
    backend = get_backend(backend_name)
    backend.register_template(Config)
    backend.register_template(Call)
    backend.register_source(Path(__file__).parent / HEADER)
