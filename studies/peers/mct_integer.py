"""model_compression_toolkit's mixed precision: distances of outputs, then an integer program."""

import copy

import torch
from network import Bench, PeerNetwork, PeerWeight
from torch import Tensor

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
BATCH = 64
SCORED_IMAGES = 32  # the default of the tool; the time is proportional to it
EPOCHS = 5  # of gradient rounding


def mct(bench: Bench, size: int, seed: int) -> PeerNetwork | None:
    """Mixed precision with the tool's own settings, scales of least squared error."""
    return _search(bench, size, seed, learned_rounding=False)


def mct_gptq(bench: Bench, size: int, seed: int) -> PeerNetwork | None:
    """The same widths, then the tool's learned rounding on the calibration images."""
    return _search(bench, size, seed, learned_rounding=True)


def _search(bench: Bench, size: int, seed: int, *, learned_rounding: bool) -> PeerNetwork | None:
    import model_compression_toolkit as toolkit

    room = bench.weight_bytes(size)
    if room < bench.n_weights * min(WIDTHS) / 8:
        return None
    torch.manual_seed(seed)
    images = bench.batches(BATCH)
    common = {
        "target_resource_utilization": toolkit.core.ResourceUtilization(weights_memory=room),
        "core_config": toolkit.core.CoreConfig(
            mixed_precision_config=toolkit.core.MixedPrecisionQuantizationConfig(
                num_of_images=SCORED_IMAGES
            )
        ),
        "target_platform_capabilities": _weights_only(),
    }
    model = copy.deepcopy(bench.task.model)
    if learned_rounding:
        config = toolkit.gptq.get_pytorch_gptq_config(
            n_epochs=EPOCHS,
            # The default estimates 100 Hessian probes per batch: hours on one core.
            use_hessian_based_weights=False,
            use_hessian_sample_attention=False,
            gradual_activation_quantization=False,
        )
        quantized, _ = toolkit.gptq.pytorch_gradient_post_training_quantization(
            model, _generator(images), gptq_config=config, **common
        )
    else:
        quantized, _ = toolkit.ptq.pytorch_post_training_quantization(
            model, _generator(images), **common
        )
    return PeerNetwork(quantized, _weights(quantized, bench))


def _generator(images: list[Tensor]):
    def generate():
        for batch in images:
            yield [batch]

    return generate


def _weights_only():
    """Convolutions and linear layers of 2 to 8 bits, a symmetric scale per channel; no activations.

    The platforms that the tool ships offer 2, 4 and 8 bits and quantize activations.
    """
    from mct_quantizers import QuantizationMethod
    from model_compression_toolkit.target_platform_capabilities.constants import (
        BIAS_ATTR,
        KERNEL_ATTR,
    )
    from model_compression_toolkit.target_platform_capabilities.schema import (
        mct_current_schema as schema,
    )

    def attribute(bit_width: int, *, enabled: bool):
        return schema.AttributeQuantizationConfig(
            weights_quantization_method=QuantizationMethod.SYMMETRIC,
            weights_n_bits=bit_width,
            weights_per_channel_threshold=True,
            enable_weights_quantization=enabled,
            lut_values_bitwidth=None,
        )

    def operation(attributes: dict):
        return schema.OpQuantizationConfig(
            default_weight_attr_config=attribute(8, enabled=False),
            attr_weights_configs_mapping=attributes,
            activation_quantization_method=QuantizationMethod.POWER_OF_TWO,
            activation_n_bits=8,
            supported_input_activation_n_bits=8,
            enable_activation_quantization=False,
            quantization_preserving=False,
            fixed_scale=None,
            fixed_zero_point=None,
            simd_size=1,
            signedness=schema.Signedness.AUTO,
        )

    widths = [
        operation(
            {KERNEL_ATTR: attribute(b, enabled=True), BIAS_ATTR: attribute(32, enabled=False)}
        )
        for b in WIDTHS
    ]
    choices = schema.QuantizationConfigOptions(
        quantization_configurations=tuple(widths), base_config=widths[0]
    )
    names = (schema.OperatorSetNames.CONV, schema.OperatorSetNames.FULLY_CONNECTED)
    return schema.TargetPlatformCapabilities(
        default_qco=schema.QuantizationConfigOptions(quantization_configurations=(operation({}),)),
        tpc_minor_version=1,
        tpc_patch_version=0,
        tpc_platform_type="weights_only",
        operator_set=tuple(schema.OperatorsSet(name=name, qc_options=choices) for name in names),
        add_metadata=False,
        name="weights_only",
    )


def _weights(model: torch.nn.Module, bench: Bench) -> dict[str, PeerWeight]:
    """What the wrappers of convolutions and linear layers hold, in the names of the task."""
    from mct_quantizers import PytorchQuantizationWrapper

    wrappers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PytorchQuantizationWrapper) and module.weights_quantizers
    }
    found = {}
    for name in bench.layers:
        # The tool writes _ for each point and appends a word where it folded a norm.
        flat = name.replace(".", "_")
        (wrapper,) = (m for known, m in wrappers.items() if known.startswith(flat))
        values = wrapper.get_quantized_weights()["weight"].detach()
        bit_width = wrapper.weights_quantizers["weight"].num_bits
        found[name] = PeerWeight(values, int(bit_width))
    return found
