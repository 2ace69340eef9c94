"""Latency of a network on a device: tables of measured kernels, and how they are measured."""
