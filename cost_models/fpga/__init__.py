"""What a fully unrolled circuit of a quantized network takes of an FPGA."""
