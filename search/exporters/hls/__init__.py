"""HLS C++ of a small network, written by hls4ml; every type follows from what can occur."""
