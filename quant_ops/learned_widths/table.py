"""Every method of learning widths by name, imported only when it is asked for."""

from importlib import import_module

from quant_ops.errors import UsageError
from quant_ops.learned_widths.base import LearnedWidths

LEARNED_WIDTHS = {
    "diffq": "quant_ops.learned_widths.diffq:DiffQ",
    "bayesian-bits": "quant_ops.learned_widths.bayesian_bits:BayesianBits",
    "dqa": "quant_ops.learned_widths.dqa:DQA",
    "fracbits": "quant_ops.learned_widths.fracbits:FracBits",
    "self-compressing": "quant_ops.learned_widths.self_compressing:SelfCompressing",
    "csq": "quant_ops.learned_widths.csq:CSQ",
    "limpq": "quant_ops.learned_widths.limpq:LIMPQ",
    "hgq": "quant_ops.learned_widths.hgq:HGQ",
}


def learned_widths_class(name: str) -> type[LearnedWidths]:
    """The class behind a name; an unknown name is a `UsageError`.

    >>> learned_widths_class("csq").__name__
    'CSQ'
    """
    if name not in LEARNED_WIDTHS:
        known = ", ".join(LEARNED_WIDTHS)
        raise UsageError(f"there is no method of learning widths {name!r}; choose from {known}")
    module, _, attribute = LEARNED_WIDTHS[name].partition(":")
    found: type[LearnedWidths] = getattr(import_module(module), attribute)
    return found
