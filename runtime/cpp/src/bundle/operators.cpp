#include "bundle/operators.hpp"

#include <algorithm>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "base/quote.hpp"
#include "bundle/protobuf_wire.hpp"

namespace tmd::internal {
namespace {

// Field numbers of ONNX's messages.
constexpr std::uint32_t kModelGraph = 7, kModelOpset = 8, kModelTraining = 20;
constexpr std::uint32_t kGraphNode = 1, kGraphInitializer = 5, kGraphQuantization = 14, kGraphSparse = 15;
constexpr std::uint32_t kNodeName = 3, kNodeOpType = 4, kNodeAttribute = 5, kNodeDomain = 7;
constexpr std::uint32_t kAttributeName = 1, kAttributeType = 20;
constexpr std::uint32_t kTensorDims = 1, kTensorDataType = 2, kTensorSegment = 3, kTensorName = 8, kTensorRaw = 9,
                        kTensorExternal = 13, kTensorLocation = 14;
constexpr std::size_t kMaxRank = 8;

bool is_standard(std::string_view domain) { return domain.empty() || domain == "ai.onnx"; }

bool is_operator(std::string_view op_type) {
  return std::binary_search(std::begin(kOperators), std::end(kOperators), op_type);
}

bool may_have(std::string_view op_type, std::string_view attribute) {
  using Pair = std::pair<std::string_view, std::string_view>;
  static const std::set<Pair> known = [] {
    std::set<Pair> pairs;
    for (const OperatorAttribute& each : kOperatorAttributes) pairs.emplace(each.op_type, each.attribute);
    return pairs;
  }();
  return known.count({op_type, attribute}) != 0;
}

// Whether an attribute has its name, its type and the value of that type, and nothing beside them.
bool holds_only(std::string_view attribute, std::int64_t type) {
  const std::uint32_t value = type == 1 ? 2 : type == 2 ? 3 : type == 3 ? 4 : 8;  // f, i, s, ints
  WireReader reader(attribute);
  for (WireField field; reader.next(&field);)
    if (field.number != kAttributeName && field.number != kAttributeType && field.number != value) return false;
  return true;
}

std::string node_problem(std::string_view node) {
  const std::string_view op_type = last_text(node, kNodeOpType), domain = last_text(node, kNodeDomain);
  const std::string shown = "node " + quote(last_text(node, kNodeName));
  if (!is_standard(domain) || !is_operator(op_type)) {
    const std::string full = std::string(domain) + (domain.empty() || op_type.empty() ? "" : ".");
    return shown + " is " + quote(full + std::string(op_type)) + ", which no graph of a bundle needs";
  }
  const std::string which = shown + " (" + std::string(op_type) + ") has an attribute that ";
  std::set<std::string_view> names;
  bool plain = true;
  for (const std::string_view attribute : all_fields(node, kNodeAttribute)) {
    const std::string_view name = last_text(attribute, kAttributeName);
    if (!names.insert(name).second || !may_have(op_type, name)) return which + "no graph of a bundle needs";
    const std::int64_t type = last_number(attribute, kAttributeType);
    const auto* end = std::end(kAttributeTypes);
    plain = plain && std::find(std::begin(kAttributeTypes), end, type) != end && holds_only(attribute, type);
  }
  return plain ? "" : which + "is not a number, a word or numbers";
}

// Bits of so many values; absent if no file could have them.
std::optional<std::uint64_t> bits_of(const std::vector<std::int64_t>& dims, std::uint64_t item) {
  for (const std::int64_t size : dims)
    if (size == 0) return 0;
  for (const std::int64_t size : dims)
    if (__builtin_mul_overflow(item, static_cast<std::uint64_t>(size), &item)) return std::nullopt;
  return item;
}

std::string weight_problem(std::string_view tensor) {
  const std::int64_t data_type = last_number(tensor, kTensorDataType);
  const auto* end = std::end(kTensorTypes);
  const auto* type = std::find_if(std::begin(kTensorTypes), end, [&](auto& each) { return each.number == data_type; });
  if (type == end) return "has the type " + std::to_string(data_type) + ", which no graph of a bundle has";
  std::vector<std::int64_t> dims;
  std::uint64_t have = 0;
  bool is_external = false;
  WireReader reader(tensor);
  for (WireField field; reader.next(&field);) {
    if (field.number == kTensorDims) {
      dims.push_back(static_cast<std::int64_t>(field.varint));
      if (dims.back() < 0 || dims.size() > kMaxRank) return "has an impossible shape";
    } else if (field.number == kTensorSegment) {
      return "is a piece of another";
    } else if (field.number != kTensorDataType && field.number != kTensorName && field.number != kTensorRaw &&
               field.number != kTensorExternal && field.number != kTensorLocation) {
      return "keeps values in other forms than bytes";
    } else if (field.number == kTensorRaw) {
      have = field.bytes.size();
    } else if (field.number == kTensorExternal) {
      if (!is_external) have = 0;
      is_external = true;
      // The check of external data has seen that these are at most 15 digits, once.
      if (last_text(field.bytes, 1) == "length") have = std::stoull(std::string(last_text(field.bytes, 2)));
    }
  }
  const std::optional<std::uint64_t> bits = bits_of(dims, type->bits);
  if (bits && *bits % 8) return "ends in half a byte";
  const std::optional<std::uint64_t> need = bits ? std::optional(*bits / 8) : std::nullopt;
  if (need == have) return "";
  return "has " + std::to_string(have) + " bytes, and its shape and type take " +
         (need ? std::to_string(*need) : "more than any file has");
}

}  // namespace

std::string operators_problem(std::string_view model) {
  if (count_fields(model, kModelOpset) != 1 || !is_standard(last_text(last_text(model, kModelOpset), 1)))
    return "it imports other operators than the standard ones";
  const std::string_view graph = last_text(model, kModelGraph);
  if (count_fields(graph, kGraphSparse) || count_fields(graph, kGraphQuantization) ||
      count_fields(model, kModelTraining))
    return "it has sparse weights or training information";
  std::string problem;
  WireReader reader(graph);
  for (WireField field; problem.empty() && reader.next(&field);) {
    if (field.number == kGraphNode) problem = node_problem(field.bytes);
    if (field.number == kGraphInitializer && !(problem = weight_problem(field.bytes)).empty())
      problem = "weight " + quote(last_text(field.bytes, kTensorName)) + " " + problem;
  }
  return problem;
}

}  // namespace tmd::internal
