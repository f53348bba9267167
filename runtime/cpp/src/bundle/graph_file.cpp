#include "bundle/graph_file.hpp"

#include <optional>
#include <tuple>
#include <vector>

#include "base/ascii.hpp"
#include "base/error.hpp"
#include "base/quote.hpp"
#include "bundle/onnx_encoding.hpp"
#include "bundle/operators.hpp"
#include "bundle/protobuf_wire.hpp"

namespace tmd::internal {
namespace {

constexpr const char* kRemedy = " Make the bundle again with tmd-export, and do not run graphs from elsewhere.";
// Field numbers of ONNX that the checks below ask for.
constexpr std::uint32_t kModelGraph = 7, kModelOpset = 8, kModelFunctions = 25;
constexpr std::uint32_t kGraphNode = 1, kGraphInitializer = 5, kGraphInput = 11, kGraphOutput = 12;
constexpr std::uint32_t kTensorName = 8, kTensorExternalData = 13, kTensorDataLocation = 14;
constexpr std::int64_t kExternal = 1;

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
  if (entries.empty() && last_number(tensor, kTensorDataLocation) != kExternal) return "";
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

std::string element_type(std::int64_t code) {
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
  if (!last_field(type, 1, 2)) return spec.name + " is not a tensor";
  const std::string_view tensor = last_text(type, 1);
  const std::string dtype = element_type(last_number(tensor, 1));
  if (dtype != dtype_name(spec.dtype))
    return spec.name + " is " + dtype + " in the file and " + dtype_name(spec.dtype) + " in the manifest";
  const std::optional<WireField> shape = last_field(tensor, 2, 2);
  if (!shape) return "";  // outputs may come without a shape; the engine then learns it from the manifest
  const std::vector<std::string_view> dims = all_fields(shape->bytes, 1);
  bool same = dims.size() == spec.shape.size();
  for (std::size_t i = 0; same && i < dims.size(); ++i) {
    const std::optional<WireField> size = last_field(dims[i], 1, 0);
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

}  // namespace

void check_graph(std::string_view data, const GraphInfo& info, std::uint64_t data_size, const std::string& where) {
  if (!is_canonical_onnx(data))
    refuse_bundle(where +
                  " is not an ONNX file, or not encoded as tmd-export encodes a graph and could be read in two " +
                  "ways." + kRemedy);
  const std::string_view graph = last_text(data, kModelGraph);
  for (const auto& [what, number, limit] :
       {std::tuple("nodes", kGraphNode, kMaxNodes), std::tuple("weights", kGraphInitializer, kMaxWeights)})
    if (const std::size_t count = count_fields(graph, number); count > limit)
      refuse_bundle(where + " has " + std::to_string(count) + " " + what + ", more than " + std::to_string(limit) +
                    "." + kRemedy);
  // Chains of functions are expanded by recursion inside the engines: a small file can exhaust the stack.
  if (count_fields(data, kModelFunctions))
    refuse_bundle(where + " defines functions of its own, which a bundle may not: export with functions inlined.");
  for_each_tensor(data, [&](std::string_view tensor) {
    const std::string problem = external_problem(tensor, info.data, data_size);
    if (!problem.empty())
      refuse_bundle(where + ": tensor " + quote(last_text(tensor, kTensorName)) + " " + problem + "." + kRemedy);
  });
  if (const std::string problem = operators_problem(data); !problem.empty())
    refuse_bundle(where + ": " + problem + "." + kRemedy);
  const std::int64_t opset = last_number(last_text(data, kModelOpset), 2);  // there is one
  if (opset != info.opset)
    refuse_bundle(where + " has opset " + std::to_string(opset) + ", the manifest says " + std::to_string(info.opset) +
                  "." + kRemedy);
  for (const bool input : {true, false}) {
    const std::string problem =
        interface_problem(all_fields(graph, input ? kGraphInput : kGraphOutput), input ? info.inputs : info.outputs);
    if (!problem.empty())
      refuse_bundle(where + ": the " + (input ? "inputs" : "outputs") + " differ from the manifest's: " + problem +
                    "." + kRemedy);
  }
}

}  // namespace tmd::internal
