#include "bundle/graph_file.hpp"

#include <optional>
#include <set>
#include <vector>

#include "base/ascii.hpp"
#include "base/error.hpp"
#include "base/quote.hpp"
#include "bundle/protobuf_wire.hpp"

namespace tmd::internal {
namespace {

struct FieldRule {
  int message;
  std::uint32_t number;
  WireKind kind;
  int inner;
  bool repeated;
};

#include "bundle/onnx_schema.inc"

constexpr const char* kRemedy = " Make the bundle again with tmd-export, and do not run graphs from elsewhere.";
// Protobuf's own limit, without which nested messages exhaust the stack.
constexpr int kMaxDepth = 100;
// Field numbers of ONNX that the checks below ask for.
constexpr std::uint32_t kModelGraph = 7, kModelOpset = 8, kModelFunctions = 25;
constexpr std::uint32_t kGraphNode = 1, kGraphInput = 11, kGraphOutput = 12;
constexpr std::uint32_t kTensorName = 8, kTensorExternalData = 13, kTensorDataLocation = 14;
constexpr std::uint64_t kExternal = 1;

const FieldRule* rule_of(int message, std::uint32_t number) {
  for (const FieldRule& rule : kFieldRules)
    if (rule.message == message && rule.number == number) return &rule;
  return nullptr;
}

bool packed_is_whole(std::string_view bytes, WireKind kind) {
  if (kind == kFixed32) return bytes.size() % 4 == 0;
  if (kind == kFixed64) return bytes.size() % 8 == 0;
  // Varints end with a byte below 128 and have at most ten bytes.
  std::size_t length = 0;
  for (const char c : bytes) {
    if (++length > 10) return false;
    if (static_cast<unsigned char>(c) < 0x80) length = 0;
  }
  return length == 0;
}

// Walks everything below `data`, refusing what protobuf's parser would refuse, and collects every TensorProto wherever
// the format allows one. False: not this message.
bool collect(std::string_view data, int message, int depth, std::vector<std::string_view>* tensors) {
  if (depth > kMaxDepth) return false;
  if (message == TensorProto) tensors->push_back(data);
  WireReader reader(data);
  std::set<std::uint32_t> singular;
  for (WireField field; reader.next(&field);) {
    const FieldRule* rule = rule_of(message, field.number);
    if (!rule || field.wire_type == 3) continue;
    if (rule->kind == kMessage && field.wire_type == 2) {
      // Protobuf merges a message that is given twice; what is checked here must not depend on how parts are put
      // together.
      if (!rule->repeated && !singular.insert(field.number).second) return false;
      if (!collect(field.bytes, rule->inner, depth + 1, tensors)) return false;
    } else if (rule->repeated && field.wire_type == 2 && rule->kind != kBytes && rule->kind != kMessage) {
      if (!packed_is_whole(field.bytes, rule->kind)) return false;
    }
  }
  return reader.good();
}

std::optional<std::uint64_t> byte_count(std::string_view text) {
  if (text.empty() || text.size() > 15) return std::nullopt;
  std::uint64_t value = 0;
  for (const char c : text) {
    if (!is_ascii_digit(static_cast<unsigned char>(c))) return std::nullopt;
    value = value * 10 + static_cast<std::uint64_t>(c - '0');
  }
  return value;
}

// Why a tensor may not keep its values where it says, or "".
std::string external_problem(std::string_view tensor, const std::optional<std::string>& data_name,
                             std::uint64_t data_size) {
  const std::vector<std::string_view> entries = all_fields(tensor, kTensorExternalData);
  const std::optional<WireField> place = last_field(tensor, kTensorDataLocation, 0);
  if (entries.empty() && !(place && place->varint == kExternal)) return "";
  std::map<std::string_view, std::string_view> found;
  for (const std::string_view entry : entries)
    if (!found.emplace(last_text(entry, 1), last_text(entry, 2)).second) return "states an external-data field twice";
  const auto location = found.find("location");
  const std::string shown = location == found.end() ? "nowhere" : quote(location->second);
  if (!data_name) return "keeps its values in " + shown + ", but the manifest names no data file for this graph";
  if (location == found.end() || location->second != *data_name)
    return "keeps its values in " + shown + ", and only " + quote(*data_name) + " is allowed";
  std::uint64_t end = 0;
  for (const char* key : {"offset", "length"}) {
    const auto entry = found.find(key);
    const std::optional<std::uint64_t> bytes = byte_count(entry == found.end() ? "0" : entry->second);
    if (!bytes) return std::string("has the ") + key + " " + quote(entry->second) + ", which is not a byte count";
    end += *bytes;
  }
  if (end > data_size)
    return "ends at byte " + std::to_string(end) + " of " + quote(*data_name) + ", which has " +
           std::to_string(data_size);
  return "";
}

std::string element_type(std::uint64_t code) {
  switch (code) {
    case 1:
      return "float32";
    case 2:
      return "uint8";
    case 6:
      return "int32";
    case 7:
      return "int64";
    case 9:
      return "bool";
    case 10:
      return "float16";
    case 16:
      return "bfloat16";
    default:
      return "of type " + std::to_string(code);
  }
}

// How a ValueInfoProto differs from what the manifest says of it, or "".
std::string interface_problem(std::string_view value, const TensorSpec& spec) {
  const std::string_view type = last_text(value, 2);
  // TypeProto's kinds exclude each other: tensor_type is 1, the others 4, 5, 7, 8, 9.
  if (!last_field(type, 1, 2)) return spec.name + " is not a tensor";
  for (const std::uint32_t other : {4u, 5u, 7u, 8u, 9u})
    if (last_field(type, other, 2)) return spec.name + " is not a tensor";
  const std::string_view tensor = last_text(type, 1);
  const std::optional<WireField> code = last_field(tensor, 1, 0);
  const std::string dtype = element_type(code ? code->varint : 0);
  if (dtype != dtype_name(spec.dtype))
    return spec.name + " is " + dtype + " in the file and " + dtype_name(spec.dtype) + " in the manifest";
  const std::optional<WireField> shape = last_field(tensor, 2, 2);
  if (!shape) return "";  // outputs may come without a shape; the engine then learns it from the manifest
  const std::vector<std::string_view> dims = all_fields(shape->bytes, 1);
  bool same = dims.size() == spec.shape.size();
  for (std::size_t i = 0; same && i < dims.size(); ++i) {
    const std::optional<WireField> size = last_field(dims[i], 1, 0);
    if (size && last_field(dims[i], 2, 2)) same = false;  // both a number and a name
    if (size)
      same = same && spec.shape[i].symbol.empty() && static_cast<std::int64_t>(size->varint) == spec.shape[i].factor;
  }
  return same ? "" : spec.name + " has another shape in the file than in the manifest";
}

std::string interface_problem(const std::vector<std::string_view>& values, const std::vector<TensorSpec>& specs) {
  std::string have, stated;
  for (const std::string_view value : values) have += (have.empty() ? "" : ", ") + std::string(last_text(value, 1));
  for (const TensorSpec& spec : specs) stated += (stated.empty() ? "" : ", ") + spec.name;
  bool same = values.size() == specs.size();
  for (std::size_t i = 0; same && i < specs.size(); ++i) same = last_text(values[i], 1) == specs[i].name;
  if (!same) return "the file has " + quote(have) + ", the manifest " + quote(stated);
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const std::string problem = interface_problem(values[i], specs[i]);
    if (!problem.empty()) return problem;
  }
  return "";
}

// Whether a field of this rule may come in this wire type; in another one it is an unknown field.
bool fits(const FieldRule& rule, int wire_type) {
  switch (wire_type) {
    case 0:
      return rule.kind == kVarint;
    case 1:
      return rule.kind == kFixed64;
    case 2:
      return rule.kind == kBytes || rule.kind == kMessage || rule.repeated;  // repeated numbers may be packed
    case 5:
      return rule.kind == kFixed32;
    default:
      return false;
  }
}

bool is_known(std::string_view data, int message) {
  WireReader reader(data);
  for (WireField field; reader.next(&field);) {
    const FieldRule* rule = rule_of(message, field.number);
    if (!rule || !fits(*rule, field.wire_type)) return false;
    if (rule->kind == kMessage && !is_known(field.bytes, rule->inner)) return false;
  }
  return true;
}

}  // namespace

bool is_all_known(std::string_view data) { return is_known(data, ModelProto); }

void check_graph(std::string_view data, const GraphInfo& info, std::uint64_t data_size, const std::string& where) {
  std::vector<std::string_view> tensors;
  if (!collect(data, ModelProto, 1, &tensors))
    refuse_bundle(where + " is not an ONNX file, though its sha256 is right." + kRemedy);
  const std::string_view graph = last_text(data, kModelGraph);
  const std::size_t nodes = all_fields(graph, kGraphNode).size();
  if (nodes > kMaxNodes)
    refuse_bundle(where + " has " + std::to_string(nodes) + " nodes, more than " + std::to_string(kMaxNodes) + "." +
                  kRemedy);
  // Chains of functions are expanded by recursion inside the engines: a small file can exhaust the stack.
  if (!all_fields(data, kModelFunctions).empty())
    refuse_bundle(where + " defines functions of its own, which a bundle may not: export with functions inlined.");
  for (const std::string_view tensor : tensors) {
    const std::string problem = external_problem(tensor, info.data, data_size);
    if (!problem.empty())
      refuse_bundle(where + ": tensor " + quote(last_text(tensor, kTensorName)) + " " + problem + "." + kRemedy);
  }
  std::optional<std::int64_t> opset;
  for (const std::string_view entry : all_fields(data, kModelOpset)) {
    const std::string_view domain = last_text(entry, 1);
    if (opset || !(domain.empty() || domain == "ai.onnx")) continue;
    const std::optional<WireField> version = last_field(entry, 2, 0);
    opset = version ? static_cast<std::int64_t>(version->varint) : 0;
  }
  if (opset != info.opset)
    refuse_bundle(where + " has opset " + (opset ? std::to_string(*opset) : "none") + ", the manifest says " +
                  std::to_string(info.opset) + "." + kRemedy);
  for (const bool input : {true, false}) {
    const std::string problem =
        interface_problem(all_fields(graph, input ? kGraphInput : kGraphOutput), input ? info.inputs : info.outputs);
    if (!problem.empty())
      refuse_bundle(where + ": the " + (input ? "inputs" : "outputs") + " differ from the manifest's: " + problem +
                    "." + kRemedy);
  }
}

}  // namespace tmd::internal
