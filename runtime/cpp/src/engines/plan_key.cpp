#include "engines/plan_key.hpp"

#include <algorithm>

#include "base/ascii.hpp"
#include "base/quote.hpp"

namespace tmd::internal {
namespace {

struct Range {
  Shape low, high;
};
using Ranges = std::map<std::string, Range>;

bool begins(const std::string& text, const std::string& with) { return text.compare(0, with.size(), with) == 0; }

std::vector<std::string> split(const std::string& text, const std::string& by) {
  std::vector<std::string> parts;
  std::size_t at = 0;
  for (std::size_t next; (next = text.find(by, at)) != std::string::npos; at = next + by.size())
    parts.push_back(text.substr(at, next - at));
  parts.push_back(text.substr(at));
  return parts;
}

std::optional<Shape> shape_from(const std::string& text) {
  Shape shape;
  if (text.empty()) return shape;
  for (const std::string& size : split(text, "x")) {
    if (size.empty() || size.size() > 12) return std::nullopt;
    for (const char c : size)
      if (!is_ascii_digit(static_cast<unsigned char>(c))) return std::nullopt;
    shape.push_back(std::stoll(size));
  }
  return shape;
}

// What a key says of sizes: "t 1, x 1x8..1x16..1x32"; absent if it is no such text.
std::optional<Ranges> ranges_from(const std::string& text) {
  Ranges ranges;
  for (const std::string& part : split(text, ", ")) {
    const std::size_t space = part.rfind(' ');
    if (space == std::string::npos || space == 0) return std::nullopt;
    const std::vector<std::string> sizes = split(part.substr(space + 1), "..");
    if (sizes.size() != 1 && sizes.size() != 3) return std::nullopt;
    const std::optional<Shape> low = shape_from(sizes.front()), high = shape_from(sizes.back());
    if (!low || !high || low->size() != high->size()) return std::nullopt;
    ranges[part.substr(0, space)] = {*low, *high};
  }
  return ranges;
}

bool takes(const std::string& there, const std::string& wanted) {
  if (there == wanted) return true;
  const std::optional<Ranges> ranges = ranges_from(there), exact = ranges_from(wanted);
  if (!ranges || !exact || ranges->size() != exact->size()) return false;
  for (const auto& [name, range] : *exact) {
    const auto found = ranges->find(name);
    if (found == ranges->end() || found->second.low.size() != range.low.size()) return false;
    for (std::size_t i = 0; i < range.low.size(); ++i)
      if (range.low[i] < found->second.low[i] || range.high[i] > found->second.high[i]) return false;
  }
  return true;
}

// "tensorrt 10.3.0" names every build of 10.3.0; which of the two a key has depends on how the package names itself.
bool same_version(const std::string& found, const std::string& wanted) {
  const std::size_t build = wanted.rfind('.');
  return found == wanted || begins(found, wanted + ".") || found == wanted.substr(0, build);
}

// Flags begin with "workspace N, ", and of those every N is as good.
std::string without_workspace(const std::string& flags) {
  const std::size_t comma = flags.find(", ");
  return begins(flags, "workspace ") && comma != std::string::npos ? flags.substr(comma) : flags;
}

bool same(const std::string& field, const std::string& there, const std::string& wanted) {
  if (field == "engine") return same_version(there, wanted);
  if (field == "flags") return without_workspace(there) == without_workspace(wanted);
  if (field == "shapes") return takes(there, wanted);
  return there == wanted;
}

}  // namespace

std::string value_of(const PlanKey& key, const std::string& field) {
  const auto found = key.find(field);
  return found == key.end() ? "nothing" : found->second;
}

std::string difference(const std::string& field, const std::string& there, const std::string& here) {
  return bare(field) + ": " + bare(there) + " there, " + bare(here) + " here";
}

std::vector<std::string> differences(const PlanKey& there, const PlanKey& wanted) {
  PlanKey fields = there;  // in the order of their names
  fields.insert(wanted.begin(), wanted.end());
  fields["lowered"] = "";
  std::vector<std::string> found;
  for (const auto& [field, value] : fields) {
    const bool both = there.count(field) && wanted.count(field);
    if (field == "lowered" ? there.count(field) : both && same(field, there.at(field), wanted.at(field))) continue;
    found.push_back(
        difference(field, value_of(there, field), field == "lowered" ? "any sha256" : value_of(wanted, field)));
  }
  return found;
}

bool is_for_graph_and_sizes(const PlanKey& there, const PlanKey& wanted) {
  return value_of(there, "title") == value_of(wanted, "title") &&
         takes(value_of(there, "shapes"), value_of(wanted, "shapes"));
}

std::string to_text(const Shapes& shapes) {
  std::string text;
  for (const auto& [name, shape] : shapes) {
    text += (text.empty() ? "" : ", ") + name + " ";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? "x" : "") + std::to_string(shape[i]);
  }
  return text;
}

std::string graph_name(const Bundle& bundle, const GraphInfo& info) {
  for (const auto& [name, each] : bundle.manifest.graphs)
    if (each.file == info.file) return name;
  return "";
}

std::uint64_t stored_bytes(const Manifest& manifest, const GraphInfo& info) {
  return manifest.files.at(info.file).size + (info.data ? manifest.files.at(*info.data).size : 0);
}

std::uint64_t stored_bytes_together(const Manifest& manifest, const std::string& graph) {
  static const std::vector<std::string> kStages[] = {{"backbone", "flow_head", "update"},
                                                     {"backbone_2", "flow_head_2", "update"},
                                                     {"decoder_first", "decoder_step"}};
  std::vector<std::string> together = {graph};
  const auto stage = std::find_if(std::begin(kStages), std::end(kStages), [&](const auto& each) {
    return std::find(each.begin(), each.end(), graph) != each.end();
  });
  if (stage != std::end(kStages)) together = *stage;
  std::uint64_t bytes = 0;
  for (const std::string& name : together)
    if (const auto found = manifest.graphs.find(name); found != manifest.graphs.end())
      bytes += stored_bytes(manifest, found->second);
  return bytes;
}

PlanKey plan_key(const Bundle& bundle, const GraphInfo& info, const Shapes& inputs, const PlanTarget& target) {
  std::string hashes;
  for (const std::string& file : {info.file, info.data.value_or("")})
    if (!file.empty()) hashes += (hashes.empty() ? "" : " ") + bundle.manifest.files.at(file).sha256;
  return {{"title", bundle.manifest.model->name + " " + graph_name(bundle, info)},
          {"graph", hashes},
          {"engine", target.engine + " " + target.version},
          {"device", target.device},
          {"compute capability", target.capability},
          {"precision", info.precision},
          {"shapes", to_text(inputs)},
          {"flags", std::string("workspace None, weight streaming ") + (target.weight_streaming ? "True" : "False") +
                        ", no TF32"}};
}

}  // namespace tmd::internal
