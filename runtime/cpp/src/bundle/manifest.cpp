#include "bundle/manifest.hpp"

#include <algorithm>
#include <set>

#include "base/ascii.hpp"
#include "base/error.hpp"
#include "base/quote.hpp"
#include "bundle/json_fields.hpp"
#include "bundle/sections.hpp"

namespace tmd::internal {
namespace {

constexpr const char* kRemedy = " Copy the bundle again, or make it again with tmd-export.";
constexpr std::int64_t kMaxCount = 1 << 20;
constexpr std::int64_t kMaxSteps = 1000;
constexpr std::int64_t kMaxTokenId = 1 << 24;
constexpr std::size_t kMaxGraphs = 32, kMaxFiles = 128;

std::int64_t count(const Field& field) { return field.integer(1, kMaxCount); }

std::vector<std::int64_t> allowed_steps(const Field& field, std::size_t most, const Field& chosen, std::int64_t value) {
  std::vector<std::int64_t> steps;
  for (const Field& item : field.list(1, most)) steps.push_back(item.integer(1, kMaxSteps));
  for (std::size_t i = 1; i < steps.size(); ++i)
    if (steps[i] <= steps[i - 1]) field.refuse("must be ascending without repeats");
  if (std::find(steps.begin(), steps.end(), value) == steps.end()) chosen.refuse("is not among " + field.place());
  return steps;
}

ModelInfo read_model(const Field& field) {
  Object object(field);
  ModelInfo model;
  model.name = object.need("name").text();
  model.family = object.need("family").text();
  model.kind = object.need("kind").one_of({"tmd", "wan", "tim"});
  model.dim = count(object.need("dim"));
  model.num_layers = count(object.need("num_layers"));
  model.head_blocks = count(object.need("head_blocks"));
  model.num_heads = count(object.need("num_heads"));
  model.head_dim = count(object.need("head_dim"));
  const std::vector<Field> patch = object.need("patch_size").list(3, 3);
  for (std::size_t i = 0; i < 3; ++i) model.patch_size[i] = count(patch[i]);
  const Field fusion = object.maybe("fusion");
  if (!fusion.is_null()) fusion.one_of({"gated", "concat"});
  const Field rope = object.maybe("rope"), classes = object.maybe("classes");
  if (!rope.is_null()) model.rope = rope.one_of({"index", "grid"});
  if (!classes.is_null()) model.classes = count(classes);
  object.done();

  if (model.dim != model.num_heads * model.head_dim) object.refuse("dim is not num_heads x head_dim");
  if (model.head_dim % 2) object.refuse("head_dim is odd, but rotary embedding turns pairs");
  const bool is_tim = model.kind == "tim";
  if (is_tim && model.head_blocks != model.num_layers) object.refuse("head_blocks is not num_layers, as in kind 'tim'");
  if (!is_tim && model.head_blocks >= model.num_layers)
    object.refuse("head_blocks leaves no block of num_layers to the backbone");
  if (fusion.is_null() == (model.kind == "tmd")) object.refuse("fusion does not go with kind");
  if (rope.is_null() == is_tim) object.refuse("rope does not go with kind");
  if (!classes.is_null() && !is_tim) object.refuse("classes do not go with kind");
  return model;
}

void read_transition(Object& object, SamplerInfo& sampler) {
  const Field steps = object.need("steps"), inner = object.need("inner_steps");
  sampler.steps = steps.integer(1, kMaxSteps);
  sampler.inner_steps = inner.integer(1, kMaxSteps);
  sampler.allowed_steps = allowed_steps(object.need("allowed_steps"), 64, steps, sampler.steps);
  sampler.allowed_inner_steps = allowed_steps(object.need("allowed_inner_steps"), 64, inner, sampler.inner_steps);
  sampler.shift = object.need("shift").number(1, 1000);
  sampler.inner_shift = object.need("inner_shift").number(1, 1000);
  sampler.t_max = object.need("t_max").number(0, 1, false);
}

void read_velocity(Object& object, SamplerInfo& sampler) {
  const Field steps = object.need("steps"), allowed = object.maybe("allowed_steps"), times = object.maybe("times");
  sampler.steps = steps.integer(1, kMaxSteps);
  sampler.any_steps = allowed.is_null();
  if (!sampler.any_steps) sampler.allowed_steps = allowed_steps(allowed, 1000, steps, sampler.steps);
  sampler.allowed_inner_steps = {1};
  sampler.shift = object.need("shift").number(1, 1000);
  sampler.time_rounding = object.need("time_rounding").one_of({"none", "integer", "nearest", "bfloat16"});
  if (const Field scale = object.maybe("init_scale"); scale.present())
    sampler.init_scale = scale.number(0, 1000, false);
  sampler.guidance = object.need("guidance").number(0, 1000);
  if (const Field prompt = object.maybe("negative_prompt"); !prompt.is_null()) sampler.negative_prompt = prompt.text();
  if (times.is_null()) return;
  for (const Field& item : times.list(1, 1000)) sampler.times.push_back(item.number(0, 1, false));
  for (std::size_t i = 1; i < sampler.times.size(); ++i)
    if (sampler.times[i] >= sampler.times[i - 1]) times.refuse("must be descending without repeats");
  if (sampler.any_steps || sampler.allowed_steps.back() > static_cast<std::int64_t>(sampler.times.size()))
    times.refuse("needs allowed_steps, none above " + std::to_string(sampler.times.size()) +
                 ": there are as many times");
}

void read_flow_map(Object& object, SamplerInfo& sampler) {
  sampler.steps = object.need("steps").integer(1, kMaxSteps);
  sampler.any_steps = true;
  sampler.allowed_inner_steps = {1};
  sampler.guidance = object.need("guidance").number(0, 1000);
  if (const Field interval = object.maybe("guidance_interval"); interval.present()) {
    const std::vector<Field> ends = interval.list(2, 2);
    const double low = ends[0].number(0, 1), high = ends[1].number(0, 2, false);
    if (low >= high) interval.refuse("is empty");
    sampler.guidance_interval[0] = low, sampler.guidance_interval[1] = high;
  }
  if (const Field prompt = object.maybe("negative_prompt"); !prompt.is_null()) sampler.negative_prompt = prompt.text();
  if (const Field rho = object.maybe("rho"); rho.present()) sampler.rho = rho.number(0, 10);
}

SamplerInfo read_sampler(const Field& field) {
  Object object(field);
  SamplerInfo sampler;
  sampler.rule = object.need("rule").one_of({"transition", "euler", "renoise", "unipc", "flow_map"});
  if (sampler.rule == "transition") {
    read_transition(object, sampler);
  } else if (sampler.rule == "flow_map") {
    read_flow_map(object, sampler);
  } else {
    read_velocity(object, sampler);
  }
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

EmbeddingTable read_table(const Field& field) {
  Object object(field);
  EmbeddingTable table;
  table.file = object.need("file").file_name();
  table.dtype = dtype_of(object.need("dtype").one_of({"float32", "float16", "bfloat16"}));
  table.rows = object.need("rows").integer(1, 1 << 24);
  table.dim = count(object.need("dim"));
  object.done();
  return table;
}

TextInfo read_text(const Field& field) {
  Object object(field);
  TextInfo text;
  if (const Field name = object.maybe("tokenizer"); !name.is_null()) text.tokenizer = name.file_name();
  text.max_length = object.need("max_length").integer(1, 65536);
  text.dim = count(object.need("dim"));
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

void read_provenance(const Field& field, Manifest& manifest) {
  Object object(field);
  manifest.source = object.need("source").text();
  object.need("source_sha256").entries(0, 1024, [](const Field& key, const Field& value) {
    key.text();
    value.sha256();
  });
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
}

void check_tables(const Manifest& manifest, std::map<std::string, std::string>& owners, const Object& object) {
  const std::pair<std::string, const std::optional<EmbeddingTable>&> tables[] = {
      {"text.embedding", manifest.text.embedding}, {"text.null_embeds", manifest.text.null_embeds}};
  for (const auto& [field, table] : tables) {
    if (!table) continue;
    const auto file = manifest.files.find(table->file);
    if (file == manifest.files.end()) object.refuse(field + " needs " + quote(table->file) + ", which is not in files");
    if (!owners.emplace(table->file, field).second || manifest.text.tokenizer == table->file)
      object.refuse(field + " shares " + quote(table->file) + " with another part");
    const auto wanted = static_cast<std::uint64_t>(table->rows * table->dim) * item_size(table->dtype);
    if (file->second.size != wanted)
      object.refuse(quote(table->file) + " has " + std::to_string(file->second.size) + " bytes, and its table takes " +
                    std::to_string(wanted));
  }
  const auto encoder = manifest.graphs.find("text_encoder");
  if (encoder == manifest.graphs.end()) return;
  bool takes_embeds = false;
  for (const TensorSpec& spec : encoder->second.inputs) takes_embeds = takes_embeds || spec.name == "token_embeds";
  if (takes_embeds != manifest.text.embedding.has_value())
    object.refuse("graph 'text_encoder' has an input 'token_embeds' exactly if there is a text.embedding");
}

void check_references(const Manifest& manifest, const Object& object) {
  std::set<std::string> lower;
  for (const auto& [name, info] : manifest.files) {
    std::string folded = name;
    for (char& c : folded) c = ascii_lower(c);
    if (!lower.insert(folded).second)
      object.refuse("two names in files differ only in case, and some file systems cannot tell them apart");
  }
  std::map<std::string, std::string> owners;
  for (const auto& [name, graph] : manifest.graphs) {
    std::vector<std::string> needed = {graph.file};
    if (graph.data) needed.push_back(*graph.data);
    for (const std::string& file : needed) {
      if (!manifest.files.count(file))
        object.refuse("graph " + quote(name) + " needs " + quote(file) + ", which is not in files");
      const auto [owner, fresh] = owners.emplace(file, name);
      if (!fresh && owner->second != name)
        object.refuse("graphs " + quote(owner->second) + " and " + quote(name) + " share " + quote(file));
    }
  }
  if (manifest.text.tokenizer && !manifest.files.count(*manifest.text.tokenizer))
    object.refuse("text.tokenizer is " + quote(*manifest.text.tokenizer) + ", which is not in files");
  check_tables(manifest, owners, object);
  const std::string& rule = manifest.sampler.rule;
  if (manifest.model.kind != (rule == "transition" ? "tmd" : rule == "flow_map" ? "tim" : "wan"))
    object.refuse("sampler.rule " + quote(manifest.sampler.rule) + " is not for kind " + quote(manifest.model.kind));
  if (manifest.model.kind != "tim" && (manifest.text.tokenization != "wan" || manifest.text.null_embeds))
    object.refuse("text.tokenization 'plain' and text.null_embeds are not for kind " + quote(manifest.model.kind));
  if ((manifest.video.frames - 1) % manifest.latents.temporal_stride)
    object.refuse("video.frames is not 1 plus a multiple of latents.temporal_stride");
  if (manifest.video.height % (manifest.latents.spatial_stride * manifest.model.patch_size[1]) ||
      manifest.video.width % (manifest.latents.spatial_stride * manifest.model.patch_size[2]))
    object.refuse("video.width and video.height must be multiples of spatial_stride x patch_size");
}

}  // namespace

Manifest parse_manifest(std::string_view data, const std::string& where) {
  if (data.size() > kMaxManifestBytes)
    refuse_bundle(where + " is larger than " + std::to_string(kMaxManifestBytes) + " bytes: no bundle needs that." +
                  kRemedy);
  const nlohmann::json document = read_strict_json(data, where);
  if (!document.is_object())
    refuse_bundle(where + " holds a JSON " + document.type_name() + ", not an object." + kRemedy);
  // Checked before anything else, so that a newer bundle says "newer" and not "unknown field".
  const auto version = document.find("schema_version");
  if (version == document.end() || !version->is_number_integer() || *version != 1)
    refuse_bundle(where +
                  " has another schema_version, and this version of tmd reads 1. "
                  "Use the tmd version that made the bundle, or export the bundle again.");

  Object object(Field(&document, "", &where));
  Manifest manifest;
  object.need("schema_version");
  manifest.model = read_model(object.need("model"));
  manifest.sampler = read_sampler(object.need("sampler"));
  manifest.latents = read_latents(object.need("latents"));
  manifest.video = read_video(object.need("video"));
  manifest.text = read_text(object.need("text"));
  object.need("graphs").entries(1, kMaxGraphs, [&](const Field& key, const Field& value) {
    manifest.graphs[key.identifier()] = read_graph(value);
  });
  object.need("files").entries(1, kMaxFiles, [&](const Field& key, const Field& value) {
    const std::string name = key.file_name();
    Object file(value);
    FileInfo info;
    info.size = static_cast<std::uint64_t>(file.need("size").integer(0, std::int64_t{1} << 40));
    info.sha256 = file.need("sha256").sha256();
    file.done();
    manifest.files[name] = info;
  });
  read_provenance(object.need("provenance"), manifest);
  object.done();
  check_references(manifest, object);
  return manifest;
}

}  // namespace tmd::internal
