"""nvidia-modelopt's `auto_quantize`: a score per (layer, width), then a solver."""

import copy
import warnings
from pathlib import Path

import torch
from network import Bench, PeerNetwork, PeerWeight
from torch import Tensor
from torch.nn import functional

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
BATCH = 64


def modelopt_gradient(bench: Bench, size: int, seed: int) -> PeerNetwork | None:
    """Score: squared product of output gradient and output error; linear program."""
    return _search(bench, size, seed, "gradient")


def modelopt_kl(bench: Bench, size: int, seed: int) -> PeerNetwork | None:
    """Score: divergence with one layer quantized; binary search of one threshold for all."""
    return _search(bench, size, seed, "kl_div")


def _search(bench: Bench, size: int, seed: int, method: str) -> PeerNetwork | None:
    import modelopt.torch.quantization as mtq

    effective_bits = 8 * bench.weight_bytes(size) / bench.n_weights
    if effective_bits < min(WIDTHS):
        return None
    generator = torch.Generator().manual_seed(seed)

    def loss(logits: Tensor, batch: Tensor) -> Tensor:
        # The score needs a gradient, which a divergence from itself has not: labels are drawn
        # from the float model's own answer.
        drawn = torch.multinomial(logits.detach().softmax(dim=1), 1, generator=generator)
        return functional.cross_entropy(logits, drawn[:, 0])

    batches = bench.batches(BATCH)
    space = {
        "module_name_patterns": ["*"],
        "quantization_formats": [_format(bit_width) for bit_width in WIDTHS],
        "allow_no_quant": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = mtq.auto_quantize(
            copy.deepcopy(bench.task.model),
            constraints={"effective_bits": effective_bits},
            module_search_spaces=[space],
            fixed_quantization_config=None,
            quantization_formats=[_format(8)],
            data_loader=batches,
            forward_step=lambda network, batch: network(batch),
            loss_func=loss if method == "gradient" else None,
            num_calib_steps=1,  # the largest magnitude of a weight needs no image
            num_score_steps=len(batches),
            method=method,
            checkpoint=str(_scores(bench, seed, method)),
        )
    return PeerNetwork(model, {name: _weight(model, name) for name in bench.layers})


def _scores(bench: Bench, seed: int, method: str) -> Path:
    """Where the tool keeps its scores, which do not depend on the size: solved anew for each."""
    path = Path("runs") / "peers" / f"{bench.task.name}-modelopt-{method}-{seed}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _format(bit_width: int) -> dict:
    """Weights only, a scale per output channel. The rule that disables all must come first."""
    weight = {"num_bits": bit_width, "axis": 0}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight, "enable": True},
        ],
        "algorithm": "max",
    }


def _weight(model: torch.nn.Module, name: str) -> PeerWeight:
    layer = model.get_submodule(name)
    quantizer = layer.weight_quantizer
    if not quantizer.is_enabled:
        raise ValueError(f"layer {name!r} was left float")
    return PeerWeight(quantizer(layer.weight).detach(), int(quantizer.num_bits))
