#include "bundle/shape_walk.hpp"

#include <cstring>

#include "bundle/protobuf_wire.hpp"

namespace tmd::internal {
namespace {

// Field numbers of ONNX's messages.
constexpr std::uint32_t kTensorDims = 1, kTensorType = 2, kTensorName = 8, kTensorRaw = 9, kTensorExternal = 13;
constexpr std::uint64_t kMaxKnown = 64;  // elements up to which whole numbers are taken for a shape, and computed

bool is_whole(std::int64_t type) {
  return type == kUint8 || type == kInt8 || type == kInt32 || type == kInt64 || type == kBool;
}

}  // namespace

std::uint64_t item_bytes(std::int64_t type) {
  switch (type) {
    case kInt64:
      return 8;
    case kUint8:
    case kInt8:
    case kBool:
    case 17:  // float8
    case 23:  // float4, one in a byte
      return 1;
    case kFloat16:
    case kBfloat16:
      return 2;
    default:
      return 4;
  }
}

std::size_t axis_of(std::int64_t axis, std::size_t rank) {
  if (axis < 0) axis += static_cast<std::int64_t>(rank);
  if (axis < 0 || axis >= static_cast<std::int64_t>(rank)) throw Unsizable{"an axis is not there"};
  return static_cast<std::size_t>(axis);
}

std::int64_t checked(std::int64_t size) {
  if (size < 0 || size > kMaxSize) throw Unsizable{"a size is out of range"};
  return size;
}

void Walk::add_weight(std::string_view weight) {
  ShapedTensor tensor;
  std::string_view raw;
  bool external = false;
  WireReader reader(weight);
  for (WireField field; reader.next(&field);) {
    if (field.number == kTensorDims) tensor.shape.push_back(checked(static_cast<std::int64_t>(field.varint)));
    if (field.number == kTensorType) tensor.type = static_cast<std::int64_t>(field.varint);
    if (field.number == kTensorRaw) raw = field.bytes;
    external = external || field.number == kTensorExternal;
  }
  const std::string_view name = last_text(weight, kTensorName);
  const std::uint64_t count = tensor.elements(), item = item_bytes(tensor.type);
  if (!external && is_whole(tensor.type) && count <= kMaxKnown && raw.size() == count * item) {
    std::vector<std::int64_t>& values = values_[name];
    for (std::uint64_t i = 0; i < count; ++i) values.push_back(read(raw.data() + i * item, tensor.type));
  }
  graph_.weights.push_back(name);
  graph_.tensors[name] = std::move(tensor);
}

void Walk::add_node(const ShapedNode& node) {
  node_ = &node;
  if (node.outputs.empty()) throw Unsizable{"it gives nothing"};
  const std::vector<ShapedTensor> given = infer();
  for (std::size_t i = 0; i < node.outputs.size(); ++i) {
    if (node.outputs[i].empty()) continue;
    if (i >= given.size()) throw Unsizable{"it gives more than is known of"};
    graph_.tensors[node.outputs[i]] = given[i];
    if (given[i].elements() > kMaxElements) throw Unsizable{"a tensor of it is larger than any memory"};
  }
  const ShapedTensor& first = given.front();
  if (node.outputs.size() != 1 || first.elements() > kMaxKnown || !is_whole(first.type)) return;
  if (auto found = compute(first)) values_[node.outputs[0]] = std::move(*found);
}

std::int64_t Walk::read(const char* from, std::int64_t type) {
  if (type == kInt64) {
    std::int64_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  if (type == kInt32) {
    std::int32_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  return type == kInt8 ? static_cast<std::int64_t>(static_cast<signed char>(*from))
                       : static_cast<std::int64_t>(static_cast<unsigned char>(*from));
}

const ShapedTensor& Walk::in(std::size_t index) const {
  const auto found = graph_.tensors.find(node_->input(index));
  if (found == graph_.tensors.end() || node_->input(index).empty()) throw Unsizable{"an input comes from nowhere"};
  return found->second;
}

const std::vector<std::int64_t>& Walk::value(std::size_t index) const {
  const auto found = values_.find(node_->input(index));
  if (found == values_.end()) throw Unsizable{"a shape does not follow from the inputs"};
  return found->second;
}

std::vector<ShapedTensor> Walk::infer() const {
  static const std::map<std::string_view, std::vector<ShapedTensor> (Walk::*)() const> rules = {
      {"Abs", &Walk::same},
      {"Add", &Walk::together},
      {"Attention", &Walk::attention},
      {"Cast", &Walk::cast},
      {"Clip", &Walk::same},
      {"Concat", &Walk::concat},
      {"Conv", &Walk::conv},
      {"ConvTranspose", &Walk::conv_transpose},
      {"Cos", &Walk::same},
      {"DequantizeLinear", &Walk::dequantize},
      {"Div", &Walk::together},
      {"Expand", &Walk::expand},
      {"Gather", &Walk::gather},
      {"Gelu", &Walk::same},
      {"Gemm", &Walk::gemm},
      {"Identity", &Walk::same},
      {"LayerNormalization", &Walk::same},
      {"MatMul", &Walk::matmul},
      {"Mul", &Walk::together},
      {"Pad", &Walk::pad},
      {"Pow", &Walk::together},
      {"QuantizeLinear", &Walk::quantize},
      {"RMSNormalization", &Walk::same},
      {"Range", &Walk::range},
      {"Reciprocal", &Walk::same},
      {"ReduceMax", &Walk::reduce},
      {"ReduceMean", &Walk::reduce},
      {"ReduceSum", &Walk::reduce},
      {"Relu", &Walk::same},
      {"Reshape", &Walk::reshape},
      {"RotaryEmbedding", &Walk::same},
      {"Round", &Walk::same},
      {"Shape", &Walk::shape_of},
      {"Sigmoid", &Walk::same},
      {"Sin", &Walk::same},
      {"Slice", &Walk::slice},
      {"Softmax", &Walk::same},
      {"Split", &Walk::split},
      {"Sqrt", &Walk::same},
      {"Squeeze", &Walk::squeeze},
      {"Sub", &Walk::together},
      {"Sum", &Walk::together},
      {"Tanh", &Walk::same},
      {"Transpose", &Walk::transpose},
      {"Unsqueeze", &Walk::unsqueeze},
  };
  const auto rule = rules.find(node_->op_type);
  if (rule == rules.end()) throw Unsizable{"there is no rule for it"};
  return (this->*rule->second)();
}

std::optional<std::vector<std::int64_t>> Walk::compute(const ShapedTensor& result) const {
  const std::string_view op = node_->op_type;
  if (op == "Shape") return part_of_shape();
  for (const std::string_view name : node_->inputs)
    if (!name.empty() && !values_.count(name)) return std::nullopt;
  if (op == "Identity" || op == "Cast" || op == "Squeeze" || op == "Unsqueeze" || op == "Reshape") return value(0);
  if (op == "Concat" && result.shape.size() == 1) {
    std::vector<std::int64_t> out;
    for (std::size_t i = 0; i < node_->inputs.size(); ++i)
      out.insert(out.end(), value(i).begin(), value(i).end());
    return out;
  }
  if (op == "Gather" && shape(0).size() == 1) {
    std::vector<std::int64_t> out;
    for (const std::int64_t at : value(1)) out.push_back(value(0)[axis_of(at, value(0).size())]);
    return out;
  }
  if (op == "Slice" && shape(0).size() == 1) {
    std::vector<std::int64_t> out = value(0);
    for (const Cut& cut : cuts()) {
      std::vector<std::int64_t> kept;
      for (std::int64_t i = 0; i < cut.count; ++i)
        kept.push_back(out[axis_of(cut.start + i * cut.step, out.size())]);
      out = std::move(kept);
    }
    return out;
  }
  if (op == "Add" || op == "Sub" || op == "Mul" || op == "Div") return arithmetic(op, result.elements());
  return std::nullopt;
}

std::optional<std::vector<std::int64_t>> Walk::arithmetic(std::string_view op, std::uint64_t count) const {
  const std::vector<std::int64_t>&a = value(0), &b = value(1);
  if ((a.size() != count && a.size() != 1) || (b.size() != count && b.size() != 1)) return std::nullopt;
  std::vector<std::int64_t> out;
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::int64_t x = a[a.size() == 1 ? 0 : i], y = b[b.size() == 1 ? 0 : i];
    std::int64_t z = 0;
    const bool wrong = op == "Add"   ? __builtin_add_overflow(x, y, &z)
                       : op == "Sub" ? __builtin_sub_overflow(x, y, &z)
                       : op == "Mul" ? __builtin_mul_overflow(x, y, &z)
                                     : y == 0 || (x == INT64_MIN && y == -1);
    if (wrong) throw Unsizable{"its value cannot be computed"};
    out.push_back(op == "Div" ? x / y : z);
  }
  return out;
}

}  // namespace tmd::internal
