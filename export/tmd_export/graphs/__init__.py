"""A torch module to a checked ONNX graph."""
