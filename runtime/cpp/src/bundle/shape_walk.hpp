// The walk through a graph that finds its shapes: what is known so far, and a rule for each operator of a bundle.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bundle/graph_shapes.hpp"

namespace tmd::internal {

using Shape = std::vector<std::int64_t>;

// Whole numbers among the types of ONNX.
inline constexpr std::int64_t kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kBool = 9;
inline constexpr std::int64_t kFloat16 = 10, kBfloat16 = 16;
inline constexpr std::int64_t kMaxSize = std::int64_t{1} << 48;  // of one dimension

// A shape, or the value of a shape, that does not follow from what is known.
struct Unsizable {
  std::string reason;
};

std::int64_t checked(std::int64_t size);  // of a dimension
std::size_t axis_of(std::int64_t axis, std::size_t rank);
std::uint64_t item_bytes(std::int64_t type);

// One node at a time; what is known so far is in `tensors` of the graph and, of small whole numbers, in `values_`.
class Walk {
 public:
  explicit Walk(ShapedGraph& graph) : graph_(graph) {}
  void add_weight(std::string_view weight);
  void add_node(const ShapedNode& node);

 private:
  static constexpr std::uint64_t kMaxElements = std::uint64_t{1} << 56;
  static std::int64_t read(const char* from, std::int64_t type);
  const ShapedTensor& in(std::size_t index) const;

  const Shape& shape(std::size_t index) const { return in(index).shape; }
  bool has(std::size_t index) const { return !node_->input(index).empty(); }
  // The numbers that an input holds.
  const std::vector<std::int64_t>& value(std::size_t index) const;

  std::vector<ShapedTensor> one(Shape shape) const { return {{in(0).type, std::move(shape)}}; }
  std::vector<ShapedTensor> infer() const;

  std::vector<ShapedTensor> same() const { return {in(0)}; }
  std::vector<ShapedTensor> cast() const { return {{node_->number("to", 0), shape(0)}}; }
  std::vector<ShapedTensor> together() const;
  std::vector<ShapedTensor> attention() const;
  std::vector<ShapedTensor> concat() const;

  std::vector<ShapedTensor> conv() const { return windows(false); }
  std::vector<ShapedTensor> conv_transpose() const { return windows(true); }
  std::vector<ShapedTensor> windows(bool transposed) const;
  std::vector<ShapedTensor> quantize() const;
  std::vector<ShapedTensor> dequantize() const;
  std::vector<ShapedTensor> expand() const;
  std::vector<ShapedTensor> gather() const;
  std::vector<ShapedTensor> gemm() const;
  std::vector<ShapedTensor> matmul() const;
  std::vector<ShapedTensor> pad() const;
  std::vector<ShapedTensor> range() const;
  std::vector<ShapedTensor> reduce() const;
  std::vector<ShapedTensor> reshape() const;
  Shape part_of_shape() const;
  std::vector<ShapedTensor> shape_of() const;

  struct Cut {
    std::size_t axis;
    std::int64_t start, count, step;
  };
  std::vector<Cut> cuts() const;
  std::vector<ShapedTensor> slice() const;
  std::vector<ShapedTensor> split() const;
  std::vector<ShapedTensor> squeeze() const;
  std::vector<ShapedTensor> unsqueeze() const;
  std::vector<ShapedTensor> transpose() const;
  // The numbers of `result`, if the node is arithmetic on shapes of numbers that are known.
  std::optional<std::vector<std::int64_t>> compute(const ShapedTensor& result) const;
  std::optional<std::vector<std::int64_t>> arithmetic(std::string_view op, std::uint64_t count) const;

  ShapedGraph& graph_;
  std::map<std::string_view, std::vector<std::int64_t>> values_;
  const ShapedNode* node_ = nullptr;
};

}  // namespace tmd::internal
