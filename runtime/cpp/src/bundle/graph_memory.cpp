// How much of a graph's tensors is in memory at once: tmd_engines/cost/operations.py, number for number.
#include <algorithm>
#include <initializer_list>
#include <set>

#include "base/saturating.hpp"
#include "bundle/graph_shapes.hpp"

namespace tmd::internal {
namespace {

bool is_one_of(std::string_view word, std::initializer_list<std::string_view> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

// The output is the input's memory.
bool is_view(std::string_view op) { return is_one_of(op, {"Identity", "Reshape", "Squeeze", "Unsqueeze"}); }

// What these make of weights alone takes the place of the weights, and is counted with them.
bool is_weight_form(std::string_view op) {
  return is_view(op) || is_one_of(op, {"Cast", "DequantizeLinear", "Transpose"});
}

bool is_product(std::string_view op) { return is_one_of(op, {"MatMul", "Gemm"}); }

// Which tensors are in memory after which node. A tensor belongs to a storage, named after its first tensor.
class Liveness {
 public:
  Liveness(const ShapedGraph& graph, const Holding& holding)
      : graph_(graph), holding_(holding), constants_(graph.weights.begin(), graph.weights.end()) {
    for (std::size_t i = 0; i < graph.nodes.size(); ++i)
      for (const std::string_view name : graph.nodes[i].inputs)
        if (!name.empty()) last_use_[name] = i;
    find_in_buffers();
    if (holding.keeps_products) find_widened();
  }

  std::uint64_t peak() {
    std::uint64_t most = 0;
    for (std::size_t i = 0; i < graph_.nodes.size(); ++i) {
      const ShapedNode& node = graph_.nodes[i];
      const bool of_weights = std::all_of(node.inputs.begin(), node.inputs.end(), [&](std::string_view name) {
        return name.empty() || constants_.count(name);
      });
      if (of_weights) {
        constants_.insert(node.outputs.begin(), node.outputs.end());
        if (!is_weight_form(node.op_type))
          for (const std::string_view name : node.outputs) folded_ = plus(folded_, bytes(name));
        continue;
      }
      for (const std::string_view name : node.inputs)  // a copy, made for its first reader
        if (to_widen_.erase(name)) hold(name, name, i);
      for (const std::string_view name : node.outputs)
        if (!name.empty() && !elsewhere_.count(name)) hold(name, storage_of(node, name), i);
      std::uint64_t now = scratch(node);
      for (const auto& [storage, size] : held_) now = plus(now, size);
      most = std::max(most, now);
      for (auto each = held_.begin(); each != held_.end();)
        each = end_[each->first] <= i ? held_.erase(each) : std::next(each);
    }
    return plus(most, folded_);
  }

 private:
  std::uint64_t bytes(std::string_view name) const {
    const auto found = graph_.tensors.find(name);
    return name.empty() || found == graph_.tensors.end() ? 0 : found->second.bytes(holding_);
  }

  // The inputs and outputs that nodes read and write in the runtime's buffers themselves. An engine that does not copy
  // all inputs has a wide copy of each that it must convert; only a Cast writes its output there.
  void find_in_buffers() {
    std::set<std::string_view> cast;
    for (const ShapedNode& node : graph_.nodes)
      if (node.op_type == "Cast" && !last_use_.count(node.outputs[0])) cast.insert(node.outputs[0]);
    const auto stays = [&](std::string_view name) {
      return holding_.copies_inputs || cast.count(name) || !graph_.tensors.at(name).is_widened(holding_);
    };
    for (const std::string_view name : graph_.outputs)
      if (stays(name)) elsewhere_.insert(name);
    for (const std::string_view name : graph_.inputs) (stays(name) ? elsewhere_ : to_widen_).insert(name);
  }

  // The large weights of 16 bits, where only products read them.
  void find_widened() {
    for (const std::string_view name : graph_.weights)
      if (const ShapedTensor& weight = graph_.tensors.at(name); weight.is_low() && bytes(name) > kWidenedBytes)
        widened_.insert(name);
    for (const ShapedNode& node : graph_.nodes)
      for (const std::string_view name : node.inputs)
        if (widened_.count(name) && !is_product(node.op_type)) return widened_.clear();
  }

  void hold(std::string_view name, std::string_view storage, std::size_t index) {
    storage_[name] = storage;
    held_.emplace(storage, bytes(name));
    const auto last = last_use_.find(name);
    const std::size_t until = std::max(index, last == last_use_.end() ? index : last->second);
    end_[storage] = std::max(end_.count(storage) ? end_[storage] : index, until);
  }

  // The storage in memory that the output only gives another shape, or its own.
  std::string_view storage_of(const ShapedNode& node, std::string_view name) const {
    const auto first = storage_.find(node.input(0));
    if (first == storage_.end()) return name;
    const auto in_memory = held_.find(first->second);
    if (in_memory == held_.end()) return name;
    // Casts between floats are none where both are float32 in memory.
    const bool shares = is_view(node.op_type) || (node.op_type == "Cast" && in_memory->second == bytes(name));
    return shares ? first->second : name;
  }

  // What the kernel allocates for itself while the node runs, where that counts.
  std::uint64_t scratch(const ShapedNode& node) const {
    const auto& tensors = graph_.tensors;
    if (is_product(node.op_type)) {
      std::uint64_t widened = 0;
      for (const std::string_view name : node.inputs)
        if (widened_.count(name)) widened = plus(widened, bytes(name));
      return widened;
    }
    if (node.op_type == "Attention") {
      bool plain = true;
      for (std::size_t i = 3; i < node.inputs.size(); ++i) plain = plain && node.inputs[i].empty();
      if (plain) return plus(plus(bytes(node.input(0)), bytes(node.input(1))), bytes(node.input(2)));
      const std::vector<std::int64_t>&query = tensors.at(node.input(0)).shape, &key = tensors.at(node.input(1)).shape;
      const std::int64_t stated = node.number("q_num_heads", 0);
      const auto side = [](const std::vector<std::int64_t>& shape) {
        return static_cast<std::uint64_t>(shape[shape.size() - 2]);
      };
      const auto heads = static_cast<std::uint64_t>(stated ? stated : query[1]);
      return times(times(times(8, static_cast<std::uint64_t>(query[0])), heads), times(side(query), side(key)));
    }
    if (node.op_type == "Gelu" && node.word("approximate") == "tanh") return bytes(node.outputs[0]);
    if (node.op_type == "Conv" && tensors.at(node.input(0)).shape.size() == 4)
      return plus(bytes(node.input(0)), bytes(node.outputs[0]));
    return 0;
  }

  const ShapedGraph& graph_;
  const Holding holding_;
  std::set<std::string_view> constants_, elsewhere_, to_widen_, widened_;
  std::uint64_t folded_ = 0;  // bytes of what is computed from weights alone, and stays
  std::map<std::string_view, std::size_t> last_use_, end_;
  std::map<std::string_view, std::string_view> storage_;
  std::map<std::string_view, std::uint64_t> held_;  // of the storages in memory
};

}  // namespace

std::uint64_t peak_activation_bytes(const ShapedGraph& graph, const Holding& holding) {
  std::uint64_t peak = times(holding.arena_halves, Liveness(graph, holding).peak());
  if (peak == UINT64_MAX) return UINT64_MAX;
  peak /= 2;
  if (holding.copies_inputs)
    for (const std::string_view name : graph.inputs) peak = plus(peak, graph.tensors.at(name).stored_bytes());
  return peak;
}

}  // namespace tmd::internal
