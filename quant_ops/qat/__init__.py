"""Quantization-aware training: modules for the trainer and for training loops of one's own."""
