#include "bundle/geometry.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/quote.hpp"
#include "bundle/protobuf_wire.hpp"

namespace tmd::internal {
namespace {

// Field numbers of ONNX's messages.
constexpr std::uint32_t kModelGraph = 7, kGraphNode = 1, kGraphInitializer = 5;
constexpr std::uint32_t kNodeInput = 1, kNodeOutput = 2, kNodeOpType = 4, kNodeAttribute = 5;
constexpr std::uint32_t kAttributeName = 1, kAttributeInt = 3, kAttributeInts = 8;
constexpr std::uint32_t kTensorDataType = 2, kTensorName = 8, kTensorRaw = 9, kTensorExternal = 13;
constexpr std::int64_t kInt64 = 7;
constexpr const char* kRemedy = ". Copy the bundle again, or make it again with tmd-export.";

bool is_one_of(std::string_view word, std::initializer_list<std::string_view> words) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

// The weights that are one number of type int64.
std::map<std::string_view, std::int64_t> whole_numbers(std::string_view graph) {
  std::map<std::string_view, std::int64_t> numbers;
  for (const std::string_view weight : all_fields(graph, kGraphInitializer)) {
    const std::string_view raw = last_text(weight, kTensorRaw);
    std::int64_t value = 0;
    if (last_number(weight, kTensorDataType) != kInt64 || raw.size() != sizeof(value) ||
        count_fields(weight, kTensorExternal))
      continue;
    std::memcpy(&value, raw.data(), sizeof(value));
    numbers[last_text(weight, kTensorName)] = value;
  }
  return numbers;
}

std::set<std::string_view> latents_of(const GraphInfo& info) {
  std::set<std::string_view> names;
  for (const TensorSpec& spec : info.inputs)
    if (spec.shape.size() == 5 && spec.shape[3].symbol == "height" && spec.shape[4].symbol == "width")
      names.insert(spec.name);
  return names;
}

std::optional<std::string_view> attribute(std::string_view node, std::string_view name) {
  for (const std::string_view each : all_fields(node, kNodeAttribute))
    if (last_text(each, kAttributeName) == name) return each;
  return std::nullopt;
}

std::vector<std::int64_t> whole_numbers_of(std::string_view attribute) {
  std::vector<std::int64_t> values;
  WireReader reader(attribute);
  for (WireField field; reader.next(&field);)
    if (field.number == kAttributeInts) values.push_back(static_cast<std::int64_t>(field.varint));
  return values;
}

// The side of the latents, 0 to 2, that a node Shape gives; absent if it gives anything else.
std::optional<std::size_t> side_given(std::string_view node) {
  const auto start = attribute(node, "start"), end = attribute(node, "end");
  if (!start || !end) return std::nullopt;
  const std::int64_t from = last_number(*start, kAttributeInt), to = last_number(*end, kAttributeInt);
  if (from < 2 || from > 4 || to != from + 1) return std::nullopt;
  return static_cast<std::size_t>(from - 2);
}

std::string shown(const std::int64_t (&patch)[3]) {
  return "[" + std::to_string(patch[0]) + ", " + std::to_string(patch[1]) + ", " + std::to_string(patch[2]) + "]";
}

}  // namespace

bool is_denoiser(std::string_view graph) { return is_one_of(graph, {"backbone", "flow_head"}); }

GraphFacts facts_of(std::string_view data, const GraphInfo& info) {
  const std::string_view graph = last_text(data, kModelGraph);
  const std::set<std::string_view> latents = latents_of(info);
  const std::map<std::string_view, std::int64_t> numbers = whole_numbers(graph);
  std::map<std::string_view, std::size_t> sides;  // values that are a side of the latents
  GraphFacts facts;
  for (const std::string_view node : all_fields(graph, kGraphNode)) {
    const std::string_view op_type = last_text(node, kNodeOpType);
    facts.attentions += is_one_of(op_type, {"Attention", "Softmax"});  // in one operator or in primitives
    std::vector<std::string_view> inputs = all_fields(node, kNodeInput);
    inputs.resize(std::max<std::size_t>(inputs.size(), 2));
    const std::vector<std::string_view> outputs = all_fields(node, kNodeOutput);
    const std::string_view out = outputs.empty() ? std::string_view() : outputs.front();
    const auto side = sides.find(inputs[0]);
    if (op_type == "Shape" && latents.count(inputs[0])) {
      if (const auto given = side_given(node)) sides[out] = *given;
    } else if (is_one_of(op_type, {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}) && side != sides.end()) {
      const std::size_t same = side->second;
      sides[out] = same;
    } else if (op_type == "Div" && side != sides.end()) {
      if (const auto by = numbers.find(inputs[1]); by != numbers.end())
        facts.divisors[side->second].insert(by->second);
    } else if (op_type == "Conv" && latents.count(inputs[0])) {
      const auto strides = attribute(node, "strides");
      const std::vector<std::int64_t> values = strides ? whole_numbers_of(*strides) : std::vector<std::int64_t>();
      for (std::size_t i = 0; i < std::min<std::size_t>(values.size(), 3); ++i) facts.divisors[i].insert(values[i]);
    }
  }
  for (auto& each : facts.divisors) each.erase(1);
  return facts;
}

void check_geometry(const Manifest& manifest, const std::map<std::string, GraphFacts>& known,
                    const std::string& where) {
  const ModelInfo& model = *manifest.model;
  for (const auto& [name, facts] : known) {
    bool divides = false, same = true;
    for (std::size_t i = 0; i < 3; ++i) {
      std::set<std::int64_t> wanted = {model.patch_size[i]};
      wanted.erase(1);
      divides = divides || !facts.divisors[i].empty();
      same = same && facts.divisors[i] == wanted;
    }
    if (divides && !same)
      refuse_bundle(where + ": model.patch_size is " + shown(model.patch_size) + ", and graph " + quote(name) +
                    " divides its latents by something else" + kRemedy);
  }
  const std::int64_t each_block = manifest.family->attentions_per_block(model);
  const std::pair<const char*, std::int64_t> shares[] = {{"backbone", model.num_layers - model.head_blocks},
                                                         {"flow_head", model.head_blocks}};
  for (const auto& [name, blocks] : shares) {
    const auto facts = known.find(name);
    const std::int64_t found = facts == known.end() ? 0 : facts->second.attentions;
    // Divided, since a product with a number of the manifest could overflow.
    if (found && (found % each_block != 0 || found / each_block != blocks))
      refuse_bundle(where + ": model.head_blocks " + std::to_string(model.head_blocks) + " of num_layers " +
                    std::to_string(model.num_layers) + " does not agree with graph " + quote(name) + ", which has " +
                    std::to_string(found) + " attentions where a block has " + std::to_string(each_block) + kRemedy);
  }
}

}  // namespace tmd::internal
