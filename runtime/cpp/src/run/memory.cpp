#include "run/memory.hpp"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <vector>

#include "autoencoder/tiles.hpp"
#include "base/saturating.hpp"
#include "bundle/graph_shapes.hpp"
#include "engines/buffer.hpp"

namespace tmd::internal {
namespace {

constexpr std::uint64_t kProcess = 100'000'000;  // libraries before any graph

// Weights and buffers are known but for a factor of two; what lies between the nodes is counted.
struct StageBytes {
  std::uint64_t rough = 0, counted = 0;
};

StageBytes stage_bytes(const Bundle& bundle, const std::vector<const char*>& names, const Dims& dims, bool one_frame,
                       const Holding& holding) {
  StageBytes total;
  for (const char* name : names) {
    const auto found = bundle.manifest.graphs.find(name);
    if (found == bundle.manifest.graphs.end() || (one_frame && std::string(name) == "decoder_step")) continue;
    const GraphInfo& info = found->second;
    total.rough = plus(total.rough, weight_bytes(bundle.manifest, info, holding));
    InputShapes shapes;
    for (const auto* tensors : {&info.inputs, &info.outputs})
      for (const TensorSpec& spec : *tensors) {
        const std::vector<std::int64_t> shape = spec.resolve(dims);
        std::uint64_t bytes = item_size(spec.dtype);
        for (const std::int64_t length : shape) bytes = times(bytes, static_cast<std::uint64_t>(length));
        total.rough = plus(total.rough, bytes);
        if (tensors == &info.inputs) shapes[spec.name] = shape;
      }
    const std::string content = bundle.read_graph(info);
    const ShapedGraph graph = infer_shapes(content, shapes, bundle.graph_path(info));
    total.counted = plus(total.counted, peak_activation_bytes(graph, holding));
  }
  return total;
}

std::vector<std::string> lines_of(const std::string& path) {
  std::vector<std::string> lines;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

// The number that is all of `text`, or follows `name` at the beginning of a line.
std::optional<std::uint64_t> number_in(const std::string& text, const std::string& name = "") {
  if (text.compare(0, name.size(), name) != 0) return std::nullopt;
  std::istringstream rest(text.substr(name.size()));
  std::uint64_t value = 0;
  if (!(rest >> value)) return std::nullopt;
  return value;
}

// What one control group leaves; absent without a limit.
std::optional<std::uint64_t> left(const std::string& group, const char* limit_name, const char* usage_name,
                                  const std::string& cache_name) {
  const auto only_number = [&](const char* name) -> std::optional<std::uint64_t> {
    const std::vector<std::string> lines = lines_of(group + "/" + name);
    return lines.empty() ? std::nullopt : number_in(lines.front());
  };
  const auto limit = only_number(limit_name), usage = only_number(usage_name);
  if (!limit || !usage) return std::nullopt;
  std::uint64_t cache = 0;
  for (const std::string& line : lines_of(group + "/memory.stat"))
    cache = number_in(line, cache_name + " ").value_or(cache);
  const std::uint64_t room = plus(*limit, cache);
  return room > *usage ? room - *usage : 0;
}

}  // namespace

std::uint64_t weight_bytes(const Manifest& manifest, const GraphInfo& graph, const Holding& holding) {
  std::uint64_t bytes = 0;
  for (const std::string& file : {graph.file, graph.data.value_or("")})
    if (const auto found = manifest.files.find(file); found != manifest.files.end())
      bytes = plus(bytes, found->second.size);
  const std::string& stored = graph.storage.empty() ? graph.precision : graph.storage;
  if (stored == "fp8") return times(4, bytes);
  if (stored == "nvfp4") return times(8, bytes);
  if (stored == "fp16" && !holding.keeps_products) return times(2 * holding.float16_weights, bytes);
  return bytes;  // of 16 bits and of int8 the large ones stay as they are
}

std::uint64_t Need::surely(Stages stages) const {
  std::uint64_t most = 0;
  for (unsigned i = 0; i < 4; ++i)
    if (stages & (1u << i)) most = std::max(most, sure[i]);
  return most;
}

Need estimate_need(const Bundle& bundle, const LatentSize& size, const Holding& holding) {
  const Manifest& manifest = bundle.manifest;
  const auto& patch = manifest.model->patch_size;
  const Dims dims = {{"batch", 1},
                     {"frames", size.frames},
                     {"height", size.height},
                     {"width", size.width},
                     {"tokens", size.frames / patch[0] * (size.height / patch[1]) * (size.width / patch[2])},
                     {"text", manifest.text.max_length}};
  Dims denoised = dims, decoded = dims;
  denoised["batch"] = size.rows;
  if (manifest.family->makes_stills()) {
    decoded["height"] = Tiling(size.height, manifest.latents.spatial_stride).tile;
    decoded["width"] = Tiling(size.width, manifest.latents.spatial_stride).tile;
  }
  Need need;
  const struct {
    Stages stage;
    std::vector<const char*> together;
    const Dims& sizes;
  } parts[] = {{kText, {"text_encoder"}, dims},
               {kDenoise, {"backbone", "flow_head", "update"}, denoised},
               {kDenoise, {"backbone_2", "flow_head_2"}, denoised},
               {kDecode, {"decoder_first", "decoder_step"}, decoded},
               {kPicture, {"encoder"}, decoded}};
  for (const auto& [stage, together, sizes] : parts) {
    const StageBytes part = stage_bytes(bundle, together, sizes, size.frames == 1, holding);
    const std::uint64_t bytes = plus(part.rough, part.counted);
    for (unsigned i = 0; i < 4; ++i)
      if (stage == 1u << i) need.sure[i] = std::max(need.sure[i], plus(part.rough / 2, part.counted));
    if (stage == kPicture) continue;  // gone before the others come
    need.all = plus(need.all, bytes);
    need.low = std::max(need.low, bytes);
  }
  need.all = plus(need.all, plus(kProcess, holding.program));
  need.low = plus(need.low, plus(kProcess, holding.program));
  return need;
}

std::optional<std::uint64_t> available_bytes(const std::string& root) {
  std::optional<std::uint64_t> least;
  const auto consider = [&](std::optional<std::uint64_t> bytes) {
    if (bytes) least = std::min(least.value_or(UINT64_MAX), *bytes);
  };
  for (const std::string& line : lines_of(root + "/proc/meminfo"))
    if (const auto kilobytes = number_in(line, "MemAvailable:")) consider(times(*kilobytes, 1024));
  for (const std::string& line : lines_of(root + "/proc/self/cgroup")) {
    // number:controllers:path
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool unified = controllers == ",,";
    if (!unified && controllers.find(",memory,") == std::string::npos) continue;
    const std::string mount = root + (unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory");
    // From the process's own group up to the root. Inside a container the path may be the host's, which is not there;
    // the limit then stands at the mount itself.
    std::string path = line.substr(second + 1);
    for (;;) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      consider(unified ? left(mount + path, "memory.max", "memory.current", "inactive_file")
                       : left(mount + path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"));
      if (path.empty()) break;
      path.resize(std::min(path.rfind('/'), path.size() - 1));
    }
  }
  return least;
}

}  // namespace tmd::internal
