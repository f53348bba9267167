#include "bundle/manifest.hpp"

#include <set>

#include "base/ascii.hpp"
#include "base/error.hpp"
#include "base/quote.hpp"
#include "bundle/json_fields.hpp"
#include "bundle/signature.hpp"

namespace tmd::internal {
namespace {

constexpr const char* kRemedy = " Copy the bundle again, or make it again with tmd-export.";
constexpr std::size_t kMaxGraphs = 32, kMaxFiles = 128;

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
  if ((manifest.video.frames - 1) % manifest.latents.temporal_stride)
    object.refuse("video.frames is not 1 plus a multiple of latents.temporal_stride");
  if (manifest.video.height % (manifest.latents.spatial_stride * manifest.model->patch_size[1]) ||
      manifest.video.width % (manifest.latents.spatial_stride * manifest.model->patch_size[2]))
    object.refuse("video.width and video.height must be multiples of spatial_stride x patch_size");
  if (!manifest.family->keeps_prompt_length() && (!manifest.text.is_padded() || manifest.text.null_embeds))
    object.refuse("text.tokenization 'plain' and text.null_embeds are not for family " +
                  quote(manifest.family->name()));
  const std::string problem = interface_problem(manifest);
  if (!problem.empty()) object.refuse(problem);
  if (const std::string own = manifest.family->problem(manifest); !own.empty()) object.refuse(own);
}

const Family* read_family(const Field& model) {
  const Field name = Object(model).need("family");
  const Family* family = find_family(name.string());
  if (!family) name.refuse("must be one of " + family_names());
  return family;
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
  if (version == document.end() || !version->is_number_integer() || *version != kSchemaVersion)
    refuse_bundle(where + " has schema_version " + (version == document.end() ? "none" : quote(version->dump())) +
                  ", and this version of tmd reads " + std::to_string(kSchemaVersion) +
                  ". Use the tmd version that made the bundle, or export the bundle again with tmd-export.");

  Object object(Field(&document, "", &where));
  Manifest manifest;
  object.need("schema_version");
  const Field model = object.need("model");
  manifest.family = read_family(model);
  manifest.model = read_model(model, *manifest.family);
  manifest.sampler = read_sampler(object.need("sampler"), *manifest.family);
  manifest.latents = read_latents(object.need("latents"));
  manifest.video = read_video(object.need("video"));
  manifest.text = read_text(object.need("text"));
  if (const Field draws = object.maybe("draws"); !draws.is_null()) manifest.draws = read_draws(draws);
  object.need("graphs").entries(1, kMaxGraphs, [&](const Field& key, const Field& value) {
    manifest.graphs[key.identifier()] = read_graph(value);
  });
  object.need("files").entries(
      1, kMaxFiles, [&](const Field& key, const Field& value) { manifest.files[key.file_name()] = read_file(value); });
  manifest.source = read_provenance(object.need("provenance"));
  object.done();
  check_references(manifest, object);
  return manifest;
}

}  // namespace tmd::internal
