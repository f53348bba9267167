#include "bundle/sections.hpp"

#include <algorithm>
#include <set>

#include "base/ascii.hpp"
#include "base/error.hpp"
#include "base/quote.hpp"
#include "bundle/family.hpp"

namespace tmd::internal {
namespace {

constexpr std::size_t kMaxTensors = 256;
constexpr std::int64_t kMaxCount = 1 << 20;
constexpr std::int64_t kMaxTokenId = 1 << 24;
constexpr std::size_t kMaxLoras = 64, kMaxWords = 4096, kMaxWordLength = 64;
constexpr double kMaxStrength = 1000.0;

// [[1-9]digits*]symbol: "height", "8*height".
Dimension symbolic(const Field& field, const std::string& text) {
  const auto letter = [](char c) { return is_ascii_letter(static_cast<unsigned char>(c)) || c == '_'; };
  const auto digit = [](char c) { return is_ascii_digit(static_cast<unsigned char>(c)); };
  Dimension dimension;
  const std::size_t star = text.find('*');
  bool good = true;
  if (star != std::string::npos) {
    good = star >= 1 && star <= 6 && text[0] != '0';
    for (std::size_t i = 0; i < star && good; ++i) good = digit(text[i]);
    if (good) dimension.factor = std::stoll(text.substr(0, star));
    dimension.starred = true;
  }
  dimension.symbol = star == std::string::npos ? text : text.substr(star + 1);
  good = good && !dimension.symbol.empty() && dimension.symbol.size() <= 32 && letter(dimension.symbol[0]);
  for (const char c : dimension.symbol) good = good && (letter(c) || digit(c));
  if (!good) field.refuse("a symbolic dimension is a name such as 'height', or a multiple of one such as '8*height'");
  return dimension;
}

TensorSpec read_tensor(const Field& field) {
  Object object(field);
  TensorSpec spec;
  spec.name = object.need("name").identifier();
  spec.dtype =
      dtype_of(object.need("dtype").one_of({"float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"}));
  for (const Field& item : object.need("shape").list(0, 8)) {
    if (item.value().is_string()) {
      spec.shape.push_back(symbolic(item, item.string()));
    } else {
      spec.shape.push_back({item.integer(1, std::int64_t{1} << 31), "", false});
    }
  }
  object.done();
  return spec;
}

// A LoRA that was merged into the weights. What it says is for the reader of the manifest alone.
void read_lora(const Field& field) {
  Object object(field);
  object.need("file").text();
  object.need("sha256").sha256();
  object.need("strength").number(-kMaxStrength, kMaxStrength);
  object.done();
}

EmbeddingTable read_table(const Field& field) {
  Object object(field);
  EmbeddingTable table;
  table.file = object.need("file").file_name();
  table.dtype = dtype_of(object.need("dtype").one_of({"float32", "float16", "bfloat16"}));
  table.rows = object.need("rows").integer(1, 1 << 24);
  table.dim = read_count(object.need("dim"));
  object.done();
  return table;
}

// One that a model may say it knows.
bool is_word_of_a_model(const std::string& word) {
  const auto allowed = [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return is_ascii_lower(byte) || is_ascii_digit(byte) || c == '\'';
  };
  return !word.empty() && word.size() <= kMaxWordLength && std::all_of(word.begin(), word.end(), allowed);
}

}  // namespace

std::int64_t read_count(const Field& field) { return field.integer(1, kMaxCount); }

std::int64_t read_steps(const Field& field) { return field.integer(1, kMaxSteps); }

std::vector<std::int64_t> read_allowed_steps(const Field& field, std::size_t most, const Field& chosen,
                                             std::int64_t value) {
  std::vector<std::int64_t> steps;
  for (const Field& item : field.list(1, most)) steps.push_back(read_steps(item));
  for (std::size_t i = 1; i < steps.size(); ++i)
    if (steps[i] <= steps[i - 1]) field.refuse("must be ascending without repeats");
  if (std::find(steps.begin(), steps.end(), value) == steps.end()) chosen.refuse("is not among " + field.place());
  return steps;
}

std::shared_ptr<const ModelInfo> read_model(const Field& field, const Family& family) {
  Object object(field);
  object.need("family");
  const std::shared_ptr<ModelInfo> model = family.read_model(object);
  model->name = object.need("name").text();
  model->architecture = object.need("architecture").text();
  model->dim = read_count(object.need("dim"));
  model->num_layers = read_count(object.need("num_layers"));
  model->head_blocks = read_count(object.need("head_blocks"));
  model->num_heads = read_count(object.need("num_heads"));
  model->head_dim = read_count(object.need("head_dim"));
  const std::vector<Field> patch = object.need("patch_size").list(3, 3);
  for (std::size_t i = 0; i < 3; ++i) model->patch_size[i] = read_count(patch[i]);
  object.done();
  if (model->dim != model->num_heads * model->head_dim) object.refuse("dim is not num_heads x head_dim");
  if (model->head_dim % 2) object.refuse("head_dim is odd, but rotary embedding turns pairs");
  family.check_model(*model, object);
  return model;
}

std::shared_ptr<ModelInfo> Family::read_model(Object&) const { return std::make_shared<ModelInfo>(); }

void Family::check_model(const ModelInfo& model, const Object& object) const {
  // A model that is cut in two.
  if (model.head_blocks >= model.num_layers) object.refuse("head_blocks leaves no block of num_layers to the backbone");
}

std::shared_ptr<const SamplerInfo> read_sampler(const Field& field, const Family& family) {
  Object object(field);
  std::shared_ptr<const SamplerInfo> sampler = family.read_sampler(object);
  object.done();
  return sampler;
}

LatentInfo read_latents(const Field& field) {
  Object object(field);
  LatentInfo latents;
  latents.channels = object.need("channels").integer(1, 1024);
  latents.temporal_stride = object.need("temporal_stride").integer(1, 64);
  latents.spatial_stride = object.need("spatial_stride").integer(1, 256);
  // For information only: the decoder graphs take normalised latents.
  const std::vector<Field> mean = object.need("mean").list(0, 1024), deviation = object.need("std").list(0, 1024);
  for (const Field& item : mean) item.number();
  for (const Field& item : deviation)
    if (item.number() <= 0) item.refuse("must be above 0");
  object.done();
  const auto channels = static_cast<std::size_t>(latents.channels);
  if (mean.size() != channels || deviation.size() != channels)
    object.refuse("mean has " + std::to_string(mean.size()) + " and std " + std::to_string(deviation.size()) +
                  " values for " + std::to_string(channels) + " channels");
  return latents;
}

VideoInfo read_video(const Field& field) {
  Object object(field);
  VideoInfo video;
  video.frames = object.need("frames").integer(1, 100000);
  video.width = object.need("width").integer(1, 65536);
  video.height = object.need("height").integer(1, 65536);
  video.fps = object.need("fps").integer(1, 1000);
  object.done();
  return video;
}

TextInfo read_text(const Field& field) {
  Object object(field);
  TextInfo text;
  if (const Field name = object.maybe("tokenizer"); !name.is_null()) text.tokenizer = name.file_name();
  text.max_length = object.need("max_length").integer(1, 65536);
  text.dim = read_count(object.need("dim"));
  std::vector<std::int64_t> ids = {text.pad_id = object.need("pad_id").integer(0, kMaxTokenId)};
  const Field eos = object.need("eos_id"), bos = object.maybe("bos_id");
  if (!eos.is_null()) ids.push_back(*(text.eos_id = eos.integer(0, kMaxTokenId)));
  if (!bos.is_null()) ids.push_back(*(text.bos_id = bos.integer(0, kMaxTokenId)));
  if (const Field word = object.maybe("tokenization"); word.present())
    text.tokenization = word.one_of({"wan", "plain"});
  if (const Field table = object.maybe("embedding"); !table.is_null()) text.embedding = read_table(table);
  if (const Field table = object.maybe("null_embeds"); !table.is_null()) text.null_embeds = read_table(table);
  object.done();
  if (text.tokenization == "wan" && (eos.is_null() || !bos.is_null()))
    object.refuse("tokenization 'wan' has an eos_id and no bos_id");
  if (static_cast<std::int64_t>(ids.size()) > text.max_length + 1)
    object.refuse("max_length has no room for bos_id and eos_id");
  if (text.embedding && *std::max_element(ids.begin(), ids.end()) >= text.embedding->rows)
    object.refuse("pad_id, eos_id and bos_id must be rows of embedding");
  if (text.null_embeds && (text.null_embeds->rows != text.max_length || text.null_embeds->dim != text.dim))
    object.refuse("null_embeds has not max_length x dim values");
  return text;
}

DrawsInfo read_draws(const Field& field) {
  Object object(field);
  DrawsInfo draws;
  for (const Field& item : object.need("words").list(1, kMaxWords)) {
    const std::string word = item.string();
    if (!is_word_of_a_model(word)) item.refuse("must be 1 to 64 letters from a to z, digits and apostrophes");
    if (!draws.words.empty() && word <= draws.words.back()) item.refuse("words must be ascending without repeats");
    draws.words.push_back(word);
  }
  draws.description = object.need("description").text();
  draws.example = object.need("example").text();
  object.done();
  return draws;
}

std::string read_provenance(const Field& field) {
  Object object(field);
  std::string source = object.need("source").text();
  object.need("source_sha256").entries(0, 1024, [](const Field& key, const Field& value) {
    key.text();
    value.sha256();
  });
  if (const Field loras = object.maybe("loras"); loras.present()) {
    for (const Field& item : loras.list(0, kMaxLoras)) read_lora(item);
  }
  object.need("tool").text();
  object.need("versions").entries(0, 64, [](const Field& key, const Field& value) {
    key.text();
    value.text();
  });
  const Field created = object.need("created");
  // 2026-01-31T12:00:00, up to nine decimals of a second, then Z or +hh:mm.
  const std::string time = created.string();
  std::size_t at = 0;
  const auto digits = [&](std::size_t low, std::size_t high) {
    const std::size_t start = at;
    while (at < time.size() && at - start < high && time[at] >= '0' && time[at] <= '9') ++at;
    return at - start >= low;
  };
  const auto mark = [&](const char* any) {
    return at < time.size() && std::string_view(any).find(time[at]) != std::string_view::npos && (++at, true);
  };
  bool good = digits(4, 4) && mark("-") && digits(2, 2) && mark("-") && digits(2, 2) && mark("T") && digits(2, 2) &&
              mark(":") && digits(2, 2) && mark(":") && digits(2, 2);
  if (good && mark(".")) good = digits(1, 9);
  good = good && (mark("Z") || (mark("+-") && digits(2, 2) && mark(":") && digits(2, 2)));
  if (!good || at != time.size()) created.refuse("must be an ISO 8601 time with zone, as 2026-01-31T12:00:00Z");
  object.done();
  return source;
}

FileInfo read_file(const Field& field) {
  Object object(field);
  FileInfo info;
  info.size = static_cast<std::uint64_t>(object.need("size").integer(0, std::int64_t{1} << 40));
  info.sha256 = object.need("sha256").sha256();
  object.done();
  return info;
}

GraphInfo read_graph(const Field& field) {
  Object object(field);
  GraphInfo graph;
  graph.file = object.need("file").file_name();
  if (const Field data = object.maybe("data"); !data.is_null()) graph.data = data.file_name();
  graph.opset = object.need("opset").integer(1, 1000);
  graph.precision = object.need("precision").one_of({"fp32", "fp16", "bf16", "fp8", "int8", "nvfp4"});
  if (const Field storage = object.maybe("storage"); !storage.is_null())
    graph.storage = storage.one_of({"fp32", "fp16", "int8"});
  for (const Field& item : object.need("inputs").list(1, kMaxTensors)) graph.inputs.push_back(read_tensor(item));
  for (const Field& item : object.need("outputs").list(1, kMaxTensors)) graph.outputs.push_back(read_tensor(item));
  if (const Field field_accuracy = object.maybe("accuracy"); !field_accuracy.is_null()) {
    Object accuracy(field_accuracy);
    if (accuracy.need("max_abs_error").number() < 0) accuracy.refuse("max_abs_error must be at least 0");
    accuracy.need("cosine").number(-1.0, 1.000001);
    accuracy.need("reference").text();
    accuracy.done();
  }
  object.done();

  constexpr std::string_view ending = ".onnx";
  if (graph.file.size() < ending.size() || graph.file.substr(graph.file.size() - ending.size()) != ending)
    object.refuse("file " + quote(graph.file) + " must end in '.onnx'");
  if (graph.data && *graph.data != graph.file + ".data")
    object.refuse("data " + quote(*graph.data) + " must be " + quote(graph.file + ".data") +
                  ": a graph has its own data file");
  std::set<std::string> names;
  for (const auto* tensors : {&graph.inputs, &graph.outputs})
    for (const TensorSpec& spec : *tensors)
      if (!names.insert(spec.name).second) object.refuse("two inputs or outputs have the same name");
  return graph;
}

DType dtype_of(const std::string& name) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i64, DType::i32, DType::u8})
    if (name == dtype_name(dtype)) return dtype;
  return DType::boolean;
}

std::size_t item_size(DType dtype) {
  switch (dtype) {
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::u8:
    case DType::boolean:
      return 1;
  }
  return 0;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::i64:
      return "int64";
    case DType::i32:
      return "int32";
    case DType::u8:
      return "uint8";
    case DType::boolean:
      return "bool";
  }
  return "";
}

std::vector<std::int64_t> TensorSpec::resolve(const Dims& dims) const {
  std::vector<std::int64_t> sizes;
  for (const Dimension& dimension : shape) {
    if (dimension.symbol.empty()) {
      sizes.push_back(dimension.factor);
      continue;
    }
    const auto found = dims.find(dimension.symbol);
    if (found == dims.end())
      fail_run("the tensor " + name + " of this bundle has a dimension " + quote(dimension.symbol) +
               " that this version of tmd does not know. Export the bundle again.");
    sizes.push_back(dimension.factor * found->second);
  }
  return sizes;
}

}  // namespace tmd::internal
