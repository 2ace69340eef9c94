"""An ONNX model from a packed one: one file per kind of step."""
