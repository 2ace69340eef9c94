"""Quantization-aware training: settings, data, objective, loop, checkpoints, and `--finetune`."""
