"""The engine openvino."""
