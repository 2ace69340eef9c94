"""Bit widths that gradients move, one small module per method, for a training loop of one's own."""
