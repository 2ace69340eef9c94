"""Every cost model by name; a module is imported when its model is first asked for."""

import importlib
from functools import cache

from cost_models.base import CostModel
from quant_ops.errors import UsageError

COST_MODELS: dict[str, str] = {
    "size_bytes": "cost_models.size:PackedSize",
    "macs": "cost_models.macs:MACs",
    "bops": "cost_models.bops:BOPs",
    "ebops": "cost_models.ebops:EBOPs",
    "ram_bytes": "cost_models.memory:PeakMemory",
    "latency_ms": "cost_models.latency.model:Latency",
    "energy_nj": "cost_models.energy:Energy",
    "lut": "cost_models.fpga.costs:LUT",
    "ff": "cost_models.fpga.costs:FF",
    "dsp": "cost_models.fpga.costs:DSP",
    "bram": "cost_models.fpga.costs:BRAM",
    "cycles": "cost_models.fpga.costs:Cycles",
}

FPGA_COSTS = ("lut", "ff", "dsp", "bram", "cycles")


@cache
def cost_model(name: str) -> CostModel:
    """The cost model called `name`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in COST_MODELS:
        raise UsageError(f"{name!r} is not a cost; known are {', '.join(COST_MODELS)}")
    module, _, class_name = COST_MODELS[name].partition(":")
    model: CostModel = getattr(importlib.import_module(module), class_name)()
    return model
