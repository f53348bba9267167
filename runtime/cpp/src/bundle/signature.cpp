#include "bundle/signature.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <vector>

#include "base/quote.hpp"

namespace tmd::internal {
namespace {

enum Side { kInput, kOutput };

// One input or output. `when` names a flag of the manifest that must be set for it to be there, "" none. `shape` lists
// dimensions with a comma between: numbers, or names joined by '*', which are numbers of the geometry and at most one
// size that is free until a run. The shape "..." is the business of the graphs that share the tensor.
struct SignatureRow {
  const char *family, *graph;
  Side side;
  const char *tensor, *dtype, *shape, *when;
};

// Graphs with numbered tensors that pass from call to call: "write" for outputs cache_NN, "step" for inputs cache_NN
// and outputs cache_NN_next.
struct CacheRow {
  const char *family, *graph, *caches;
};

#include "bundle/signatures.inc"

constexpr const char* kPassed = "...";
constexpr const char* kNext = "_next";
const std::set<std::string> kFree = {"batch", "frames", "height", "width", "tokens", "text"};

bool begins(const std::string& text, const std::string& with) { return text.compare(0, with.size(), with) == 0; }

bool ends(const std::string& text, const std::string& with) {
  return text.size() >= with.size() && text.compare(text.size() - with.size(), with.size(), with) == 0;
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  for (std::size_t start = 0; start <= text.size();) {
    const std::size_t end = std::min(text.find(at, start), text.size());
    parts.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

// The numbers that shapes are made of.
std::map<std::string, std::int64_t> geometry(const Manifest& manifest) {
  return {{"channels", manifest.latents.channels},
          {"stride", manifest.latents.spatial_stride},
          {"frame_stride", manifest.latents.temporal_stride},
          {"dim", manifest.model->dim},
          {"half_head", manifest.model->head_dim / 2},
          {"text_dim", manifest.text.dim},
          {"table_dim", manifest.text.embedding ? manifest.text.embedding->dim : 1}};
}

std::set<std::string> flags(const Manifest& manifest) {
  std::set<std::string> set = {manifest.classes() ? "classes" : "prompt", manifest.text.embedding ? "table" : "ids",
                               ""};
  if (manifest.text.is_padded()) set.insert("padded");
  if (manifest.holds_first_frame()) set.insert("first_frame");
  return set;
}

std::vector<Dimension> resolved(const char* shape, const std::map<std::string, std::int64_t>& numbers) {
  std::vector<Dimension> dimensions;
  for (const std::string& text : split(shape, ',')) {
    Dimension dimension;
    for (const std::string& part : split(text, '*')) {
      const auto number = numbers.find(part);
      if (kFree.count(part))
        dimension.symbol = part;
      else
        dimension.factor *= number != numbers.end() ? number->second : std::stoll(part);
    }
    dimension.starred = !dimension.symbol.empty() && dimension.factor != 1;
    dimensions.push_back(std::move(dimension));
  }
  return dimensions;
}

std::string shown(const std::vector<Dimension>& shape) {
  std::string text;
  for (const Dimension& dimension : shape) {
    text += text.empty() ? "" : ", ";
    if (dimension.symbol.empty() || dimension.starred) text += std::to_string(dimension.factor);
    text += (dimension.starred ? "*" : "") + dimension.symbol;
  }
  return "[" + text + "]";
}

const std::vector<TensorSpec>& side_of(const GraphInfo& graph, Side side) {
  return side == kInput ? graph.inputs : graph.outputs;
}

// How one tensor differs from its row, or "".
std::string tensor_problem(const std::string& where, const TensorSpec& spec, const SignatureRow& row,
                           const std::map<std::string, std::int64_t>& numbers) {
  const std::vector<Dimension> shape = std::strcmp(row.shape, kPassed) == 0 ? spec.shape : resolved(row.shape, numbers);
  if (std::strcmp(dtype_name(spec.dtype), row.dtype) != 0 || spec.shape != shape)
    return "the " + where + " is " + dtype_name(spec.dtype) + " " + shown(spec.shape) + ", and the model's sizes say " +
           row.dtype + " " + shown(shape);
  for (const Dimension& dimension : spec.shape)
    if (!dimension.symbol.empty() && !kFree.count(dimension.symbol))
      return "the " + where + " has a size " + quote(dimension.symbol) + " that no run knows";
  return "";
}

std::string side_problem(const Manifest& manifest, const std::string& name, const GraphInfo& graph, Side side,
                         const char* caches) {
  const auto numbers = geometry(manifest);
  const std::set<std::string> set = flags(manifest);
  const auto where = [&](const std::string& tensor) {
    return std::string(side == kInput ? "input " : "output ") + quote(tensor) + " of graph " + quote(name);
  };
  std::map<std::string, const TensorSpec*> others;
  const bool cached = std::strcmp(caches, "step") == 0 || (std::strcmp(caches, "write") == 0 && side == kOutput);
  for (const TensorSpec& spec : side_of(graph, side))
    if (!(cached && begins(spec.name, "cache_"))) others[spec.name] = &spec;
  for (const SignatureRow& row : kSignatures) {
    if (row.side != side || manifest.family->name() != std::string(row.family) || name != row.graph ||
        !set.count(row.when))
      continue;
    const auto found = others.find(row.tensor);
    if (found == others.end()) return "there is no " + where(row.tensor) + ", which the family needs";
    const std::string problem = tensor_problem(where(row.tensor), *found->second, row, numbers);
    if (!problem.empty()) return problem;
    others.erase(found);
  }
  return others.empty() ? "" : "this family has no " + where(others.begin()->first);
}

using Caches = std::map<std::string, std::pair<DType, std::vector<Dimension>>>;

Caches caches_of(const std::vector<TensorSpec>& specs, const std::string& suffix = "") {
  Caches found;
  for (const TensorSpec& spec : specs) {
    if (!begins(spec.name, "cache_")) continue;
    std::string name = spec.name;
    if (ends(name, suffix)) name.resize(name.size() - suffix.size());
    found[name] = {spec.dtype, spec.shape};
  }
  return found;
}

std::string cache_problem(const Manifest& manifest) {
  const auto first = manifest.graphs.find("decoder_first"), step = manifest.graphs.find("decoder_step");
  std::vector<Caches> every;
  if (first != manifest.graphs.end()) every.push_back(caches_of(first->second.outputs));
  if (step != manifest.graphs.end()) {
    for (const TensorSpec& spec : step->second.outputs)
      if (begins(spec.name, "cache_") && !ends(spec.name, kNext))
        return "the caches that graph 'decoder_step' writes must end in '_next'";
    every.push_back(caches_of(step->second.inputs));
    every.push_back(caches_of(step->second.outputs, kNext));
  }
  for (const Caches& caches : every) {
    if (caches != every.front()) return "graphs 'decoder_first' and 'decoder_step' do not pass the same caches";
    for (const auto& [name, cache] : caches) {
      bool good = cache.first == DType::f32 || cache.first == DType::f16;
      for (const Dimension& dimension : cache.second)
        good = good && (dimension.symbol.empty() || dimension.symbol == "batch" || dimension.symbol == "height" ||
                        dimension.symbol == "width");
      if (!good) return "a cache is float32 or float16, of fixed sizes, 'batch', 'height' and 'width'";
    }
  }
  return "";
}

// What one graph hands to another has one shape.
std::string passed_problem(const Manifest& manifest) {
  std::map<std::string, std::pair<std::string, std::vector<Dimension>>> shapes;
  for (const SignatureRow& row : kSignatures) {
    const auto graph = manifest.graphs.find(row.graph);
    if (std::strcmp(row.shape, kPassed) != 0 || manifest.family->name() != std::string(row.family) ||
        graph == manifest.graphs.end())
      continue;
    for (const TensorSpec& spec : side_of(graph->second, row.side)) {
      if (spec.name != row.tensor) continue;
      const auto [owner, fresh] = shapes.emplace(spec.name, std::make_pair(graph->first, spec.shape));
      if (!fresh && owner->second.second != spec.shape)
        return "graphs " + quote(owner->second.first) + " and " + quote(graph->first) + " disagree on the shape of " +
               spec.name;
    }
  }
  return "";
}

}  // namespace

std::string interface_problem(const Manifest& manifest) {
  const std::string family = manifest.family->name();
  for (const auto& [name, graph] : manifest.graphs) {
    bool known = false;
    for (const SignatureRow& row : kSignatures) known = known || (family == row.family && name == row.graph);
    if (!known) return "there is no graph " + quote(name) + " in family " + quote(family);
    const char* caches = "";
    for (const CacheRow& row : kCaches)
      if (family == row.family && name == row.graph) caches = row.caches;
    for (const Side side : {kInput, kOutput}) {
      const std::string problem = side_problem(manifest, name, graph, side, caches);
      if (!problem.empty()) return problem;
    }
  }
  const std::string problem = cache_problem(manifest);
  return problem.empty() ? passed_problem(manifest) : problem;
}

}  // namespace tmd::internal
