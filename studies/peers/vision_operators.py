"""Lets torchvision be imported beside a CPU build of torch, whose operators it cannot load.

Both peers import torchvision (one through transformers) and neither uses its operators here; the
import alone needs the two schemas to exist.
"""

import torch

_KEPT: list[torch.library.Library] = []  # a schema lives as long as its library
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare() -> None:
    """Call once, before the first import of a peer."""
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _KEPT.append(library)
