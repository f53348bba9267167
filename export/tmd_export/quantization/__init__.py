"""Graphs in int8, fp8 and nvfp4: QuantizeLinear and DequantizeLinear around the large products of the DiT blocks.

`layers` says which products these are, `formats` in which format each is (`scaled`: 8 bits, `blocks`: 4 bits, whose
numbers are `nvfp4`), `qdq` rewrites a traced graph, `weights` rounds weights as they are written.
What ranges activations have is measured on the float32 graphs (`observe`), over whole samplings of real prompts by the
runtime (`samplings`). `rounded` computes in float32 what a quantized graph computes, `contributions` finds each layer's
part of the error (`trunk`, `merging`), and `sensitivity` chooses the layers that stay. `calibration` is the file that
keeps all this, and `quantizer` the whole of it, as an export uses it. Which patterns and scales: docs/precision.md.

This is the one room of the export that imports `tmd_runtime`: a model is calibrated on what its users will run.
"""
