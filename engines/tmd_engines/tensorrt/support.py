"""What the ONNX parser of TensorRT 10 takes: operators and the types of their data, by version.

Written down from docs/operators.md of github.com/onnx/onnx-tensorrt: of release 10.1 (commit 96e7811) and of 10.15, and
from its docs/Changelog.md, which names no new operator or type between 10.1 and 10.3, the version that JetPack 6 comes
with. What came with 10.4 to 10.14 counts as new in 10.15: a graph that passes for 10.3 passes for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOATS = frozenset(("FP32", "FP16", "BF16"))
INTS = frozenset(("INT32", "INT64"))
BOOL = frozenset(("BOOL",))
QUANTIZED = frozenset(("INT8", "FP8", "INT4", "FP4"))  # only between QuantizeLinear and DequantizeLinear
Types = frozenset[str]

_FLOATING = (
    "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum "
    "Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization GRU "
    "HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax "
    "LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization ParametricSoftplus Pow PRelu "
    "QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RNN Round "
    "ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample"
)
_NUMERIC = (
    "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod "
    "Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK"
)
_ANY = (
    "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
    "Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where"
)
_NARROW = "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign"  # no bfloat16

_OPERATORS_10_3: dict[str, Types] = {
    **dict.fromkeys(_FLOATING.split(), FLOATS),
    **dict.fromkeys(_NUMERIC.split(), FLOATS | INTS),
    **dict.fromkeys(_ANY.split(), FLOATS | INTS | BOOL),
    **dict.fromkeys(_NARROW.split(), FLOATS - {"BF16"}),
    **dict.fromkeys(("And", "Not", "Or", "Xor"), BOOL),
    **dict.fromkeys(("Cast", "CastLike"), FLOATS | INTS | BOOL | {"UINT8"}),
    "DequantizeLinear": frozenset(("INT8", "FP8", "INT4")),
}
_OPERATORS_10_15: dict[str, Types] = {
    **_OPERATORS_10_3,
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), FLOATS - {"BF16"}),
    "Attention": FLOATS | {"INT8", "FP8"},
    "DequantizeLinear": QUANTIZED,
    "Pow": FLOATS | INTS,
    "RMSNormalization": FLOATS,
    "RotaryEmbedding": FLOATS,
    "TensorScatter": FLOATS | {"INT32"},
}


@dataclass(frozen=True)
class Support:
    """The matrix of one line of versions: `first` is where it begins, `constant_axes` whose axes must be constants."""

    first: tuple[int, int]
    opsets: range
    operators: dict[str, Types]
    constant_axes: frozenset[str]


_REDUCTIONS = frozenset(name for name in _NUMERIC.split() if name.startswith("Reduce"))
_CONSTANT = _REDUCTIONS | {"CumSum", "Squeeze", "Unsqueeze"}
ASKED_SINCE = (11, 0)  # the parser of TensorRT for RTX is that of TensorRT 11, and can be asked on any machine
SUPPORT = (
    Support((10, 0), range(9, 21), _OPERATORS_10_3, _CONSTANT | {"Pad", "Slice"}),
    Support((10, 15), range(9, 25), _OPERATORS_10_15, _CONSTANT),
)


def support_of(version: tuple[int, int]) -> Support:
    """The matrix that counts for TensorRT `version` (major, minor)."""
    return next(support for support in reversed(SUPPORT) if version >= support.first or support is SUPPORT[0])
