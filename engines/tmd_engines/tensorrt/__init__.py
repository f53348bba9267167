"""The engine tensorrt: lowering, build and run of plans."""
