"""The engine onnxruntime, on the CPU and on an NVIDIA GPU, and how a graph is lowered for it."""
