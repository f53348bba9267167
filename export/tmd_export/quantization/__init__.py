"""Graphs in int8 and fp8: explicit QuantizeLinear and DequantizeLinear around the large products of the DiT blocks.

`layers` says which products these are, `qdq` rewrites a traced graph, `weights` rounds weights as they are written.
What ranges activations have is measured on the float32 graphs, run over whole samplings of real prompts (`rollout`,
`observe`), and so is what each layer does to the result (`sensitivity`); `calibration` is the file that keeps both, and
`quantizer` the whole of it, as an export uses it. Which patterns and scales, and why: docs/precision.md.
"""
