"""The strategies that learn widths by a size in the loss, one class per method."""

from quant_ops.learned_widths.bayesian_bits import BayesianBits
from quant_ops.learned_widths.csq import CSQ
from quant_ops.learned_widths.diffq import DiffQ
from quant_ops.learned_widths.dqa import DQA
from quant_ops.learned_widths.fracbits import FracBits
from quant_ops.learned_widths.hgq import HGQ
from quant_ops.learned_widths.self_compressing import SelfCompressing
from search.strategies.gradient import GradientStrategy, traits_of
from search.strategies.gradient_settings import settings_with


class HGQStrategy(GradientStrategy):
    """Fixed point with learned fraction and integer bits [Sun2024].

    Trained to the end at the widths found, the scales are no longer powers of two.
    """

    name = "hgq"
    traits = traits_of("fixed point with learned fraction and integer bits")
    method = HGQ
    Settings = settings_with(HGQ)  # type: ignore[assignment]


class DiffQStrategy(GradientStrategy):
    """Pseudo quantization noise of a learned width [Defossez2022]."""

    name = "diffq"
    traits = traits_of("pseudo quantization noise of a learned width")
    method = DiffQ
    Settings = settings_with(DiffQ)  # type: ignore[assignment]


class BayesianBitsStrategy(GradientStrategy):
    """Residuals of 2, 4, 8 bits behind gates; prunes [VanBaalen2020]."""

    name = "bayesian-bits"
    traits = traits_of("residuals of 2, 4, 8 bits behind gates; prunes")
    method = BayesianBits
    Settings = settings_with(BayesianBits)  # type: ignore[assignment]


class DQAStrategy(GradientStrategy):
    """Attention over high, medium and low widths [BoukliHacene2021]."""

    name = "dqa"
    traits = traits_of("attention over high, medium and low widths")
    method = DQA
    Settings = settings_with(DQA)  # type: ignore[assignment]


class FracBitsStrategy(GradientStrategy):
    """Mixture of the two neighbouring widths [Yang2021a]."""

    name = "fracbits"
    traits = traits_of("mixture of the two neighbouring widths")
    method = FracBits
    Settings = settings_with(FracBits)  # type: ignore[assignment]


class SelfCompressingStrategy(GradientStrategy):
    """Bits of every group straight through [Csefalvay2023]."""

    name = "self-compressing"
    traits = traits_of("bits of every group straight through")
    method = SelfCompressing
    Settings = settings_with(SelfCompressing)  # type: ignore[assignment]


class CSQStrategy(GradientStrategy):
    """Bit planes switched off one by one [Xiao2023]."""

    name = "csq"
    traits = traits_of("bit planes switched off one by one")
    method = CSQ
    Settings = settings_with(CSQ)  # type: ignore[assignment]
