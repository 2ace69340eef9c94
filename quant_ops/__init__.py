"""A quantized network as data and arithmetic: graph, candidate, quantizers, packing, reference."""

PROJECT = "bitfront"
