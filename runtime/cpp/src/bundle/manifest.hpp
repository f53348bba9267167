// The manifest of a bundle, schema version 1, as types. The rules are those of docs/bundle.md and of Python's
// tmd_engines.bundle.manifest: what one refuses, the other refuses, and tests compare their verdicts.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tmd::internal {

inline constexpr const char* kManifestName = "manifest.json";
inline constexpr std::size_t kMaxManifestBytes = std::size_t{1} << 20;

enum class DType { f32, f16, bf16, i64, i32, u8, boolean };
std::size_t item_size(DType dtype);
const char* dtype_name(DType dtype);

// A positive number (symbol empty), a symbol, or a multiple of one: 8*height.
struct Dimension {
  std::int64_t factor = 1;
  std::string symbol;
};

using Dims = std::map<std::string, std::int64_t>;  // symbol -> size

struct TensorSpec {
  std::string name;
  DType dtype = DType::f32;
  std::vector<Dimension> shape;
  // The shape in numbers; symbols that `dims` does not know are an Error.
  std::vector<std::int64_t> resolve(const Dims& dims) const;
};

struct GraphInfo {
  std::string file;
  std::optional<std::string> data;
  std::int64_t opset = 0;
  std::string precision, storage;  // of the arithmetic; of the large weights in the file, "" if the same
  std::vector<TensorSpec> inputs, outputs;
};

struct FileInfo {
  std::uint64_t size = 0;
  std::string sha256;
};

struct ModelInfo {
  std::string name, family, kind;
  std::int64_t dim = 0, num_layers = 0, head_blocks = 0, num_heads = 0, head_dim = 0;
  std::int64_t patch_size[3] = {1, 1, 1};  // frames, height, width
  std::string rope;                        // of kind "tim": "index", "grid"
  std::int64_t classes = 0;                // of a model of numbered classes, which takes no prompt
};

// All kinds of sampler: "transition" uses inner_* and t_max, "flow_map" guidance, guidance_interval and rho, the others
// times, time_rounding, init_scale and guidance.
struct SamplerInfo {
  std::string rule;
  std::int64_t steps = 0, inner_steps = 1;
  std::vector<std::int64_t> allowed_steps, allowed_inner_steps;
  bool any_steps = false;  // allowed_steps null
  double shift = 1.0, inner_shift = 1.0, t_max = 1.0;
  std::vector<double> times;  // empty: null
  std::string time_rounding = "none";
  double init_scale = 1.0, guidance = 1.0;
  double guidance_interval[2] = {0.0, 1.0}, rho = 0.0;
  std::optional<std::string> negative_prompt;
};

struct LatentInfo {
  std::int64_t channels = 0, temporal_stride = 1, spatial_stride = 1;
};

struct VideoInfo {
  std::int64_t frames = 0, width = 0, height = 0, fps = 0;
};

// A token embedding outside the graphs: rows x dim values, little-endian, row after row.
struct EmbeddingTable {
  std::string file;
  DType dtype = DType::f32;
  std::int64_t rows = 0, dim = 0;
};

// Tokenization "wan": cleaned, `ids eos pad...`; "plain": as it is, `bos ids eos`, with the marks that there are.
struct TextInfo {
  std::optional<std::string> tokenizer;
  std::int64_t max_length = 0, dim = 0, pad_id = 0;
  std::optional<std::int64_t> bos_id, eos_id;
  std::string tokenization = "wan";
  std::optional<EmbeddingTable> embedding;    // of the tokens
  std::optional<EmbeddingTable> null_embeds;  // the empty prompt's, max_length x dim
};

struct Manifest {
  ModelInfo model;
  SamplerInfo sampler;
  LatentInfo latents;
  VideoInfo video;
  TextInfo text;
  std::map<std::string, GraphInfo> graphs;
  std::map<std::string, FileInfo> files;
  std::string source;  // provenance.source
};

// Checked manifest from the bytes of manifest.json; `where` names the file in messages. Throws Error(BUNDLE) only.
Manifest parse_manifest(std::string_view data, const std::string& where);

}  // namespace tmd::internal
