// The shape of every tensor of a graph at given input sizes, without its weights and without an engine: the twin of
// tmd_engines/cost/shapes.py, for the operators of a bundle. Small whole numbers, the arithmetic on shapes, are
// computed.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "bundle/holding.hpp"

namespace tmd::internal {

struct ShapedTensor {
  std::int64_t type = 0;  // as ONNX counts them: 1 is float32
  std::vector<std::int64_t> shape;

  std::uint64_t elements() const;
  bool is_low() const;  // a float of 16 bits
  bool is_widened(const Holding& holding) const;
  // Bytes in an engine on a CPU, and as they are in a buffer. UINT64_MAX for more than 64 bits count.
  std::uint64_t bytes(const Holding& holding) const;
  std::uint64_t stored_bytes() const;
};

struct ShapedNode {
  std::string_view name, op_type;
  std::vector<std::string_view> inputs, outputs;  // an input that is left out has no name
  std::map<std::string_view, std::string_view> attributes;

  std::string_view input(std::size_t index) const { return index < inputs.size() ? inputs[index] : std::string_view(); }
  std::int64_t number(std::string_view attribute, std::int64_t otherwise) const;
  std::vector<std::int64_t> numbers(std::string_view attribute) const;
  std::string_view word(std::string_view attribute) const;
};

// A graph with all sizes known. Views into the file that it was made of.
struct ShapedGraph {
  std::vector<ShapedNode> nodes;
  std::map<std::string_view, ShapedTensor> tensors;  // inputs, weights, and what nodes give
  std::vector<std::string_view> inputs, outputs, weights;
};

using InputShapes = std::map<std::string, std::vector<std::int64_t>>;

// Throws Error(BUNDLE) if a shape does not follow from the inputs. `data` is a file that check_graph has accepted, and
// must outlive the result; `where` names it in messages.
ShapedGraph infer_shapes(std::string_view data, const InputShapes& input_shapes, const std::string& where);

// The most memory that an engine on a CPU needs between inputs and outputs, in bytes: the twin of
// tmd_engines/cost/operations.py, peak_activation_bytes.
std::uint64_t peak_activation_bytes(const ShapedGraph& graph, const Holding& holding);

}  // namespace tmd::internal
