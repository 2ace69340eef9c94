"""High Granularity Quantization: fixed point with learned integer and fraction bits [Sun2024].

    model = nn.Sequential(HGQLinear(64, 32), nn.ReLU(), HGQLinear(32, 10))
    loss = criterion(model(x), target) + penalty(model, beta=1e-6)

Layers quantize their input, weight and bias; `ebops(model)` is the cost of the last forward pass in
training mode, differentiable in every width. `quant_ops.hgq.bridge` makes stored layers of them.
"""

from quant_ops.hgq.fixed_point import OVERFLOWS, ROUNDINGS, Arithmetic
from quant_ops.hgq.fused import FusedTraining
from quant_ops.hgq.layers import HGQActivation, HGQConv1d, HGQConv2d, HGQLinear
from quant_ops.hgq.quantizer import KBIQuantizer, KIFQuantizer, QuantizerSpec
from quant_ops.hgq.schedule import BudgetController, LogLinearBeta
from quant_ops.hgq.together import quantize_together
from quant_ops.hgq.totals import code_bytes, digit_span_ebops, ebops, penalty, trace_ranges

__all__ = [
    "OVERFLOWS",
    "ROUNDINGS",
    "Arithmetic",
    "BudgetController",
    "FusedTraining",
    "HGQActivation",
    "HGQConv1d",
    "HGQConv2d",
    "HGQLinear",
    "KBIQuantizer",
    "KIFQuantizer",
    "LogLinearBeta",
    "QuantizerSpec",
    "code_bytes",
    "digit_span_ebops",
    "ebops",
    "penalty",
    "quantize_together",
    "trace_ranges",
]
