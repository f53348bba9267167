// The sections of a manifest, as types, and how each is read. What a family adds to `model` and `sampler` is in its own
// module (family.hpp).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bundle/json_fields.hpp"

namespace tmd::internal {

enum class DType { f32, f16, bf16, i64, i32, u8, boolean };
std::size_t item_size(DType dtype);
const char* dtype_name(DType dtype);
DType dtype_of(const std::string& name);  // of a name that dtype_name gives

// A positive number (symbol empty), a symbol, or a multiple of one: 8*height.
struct Dimension {
  std::int64_t factor = 1;
  std::string symbol;
  bool starred = false;  // "1*height" is not "height": a manifest says a shape in one way
  bool operator==(const Dimension& other) const {
    return factor == other.factor && symbol == other.symbol && starred == other.starred;
  }
  bool operator!=(const Dimension& other) const { return !(*this == other); }
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

// What the graphs compute. A family's own fields are in a type derived from this one.
struct ModelInfo {
  virtual ~ModelInfo() = default;
  std::string name, architecture;
  std::int64_t dim = 0, num_layers = 0, head_blocks = 0, num_heads = 0, head_dim = 0;
  std::int64_t patch_size[3] = {1, 1, 1};  // frames, height, width
};

// How a model is sampled by default: the name of its update, and how many steps. A family's own fields are in a type
// derived from this one.
struct SamplerInfo {
  virtual ~SamplerInfo() = default;
  std::string rule;
  std::int64_t steps = 0, inner_steps = 1;
  std::vector<std::int64_t> allowed_steps;  // ascending; empty: any number up to kMaxSteps
  std::vector<std::int64_t> allowed_inner_steps = {1};
};

inline constexpr std::int64_t kMaxSteps = 1000;

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
  bool is_padded() const { return tokenization == "wan"; }
};

// What a model of few words draws: all words that it knows, ascending, what it shows as half a sentence, and a prompt.
struct DrawsInfo {
  std::vector<std::string> words;
  std::string description, example;
};

class Family;

std::shared_ptr<const ModelInfo> read_model(const Field& field, const Family& family);
std::shared_ptr<const SamplerInfo> read_sampler(const Field& field, const Family& family);
LatentInfo read_latents(const Field& field);
VideoInfo read_video(const Field& field);
TextInfo read_text(const Field& field);
DrawsInfo read_draws(const Field& field);
GraphInfo read_graph(const Field& field);
FileInfo read_file(const Field& field);
std::string read_provenance(const Field& field);  // its `source`
// All of them throw Error(BUNDLE) that names the place.

// For the families: a count of something, a number of steps, and the numbers of steps that `chosen` must be among.
std::int64_t read_count(const Field& field);
std::int64_t read_steps(const Field& field);
std::vector<std::int64_t> read_allowed_steps(const Field& field, std::size_t most, const Field& chosen,
                                             std::int64_t value);

}  // namespace tmd::internal
