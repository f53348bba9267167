#include "sampling/backbone.hpp"

#include "sampling/schedule.hpp"

namespace tmd::internal {

BoundBackbone::BoundBackbone(LoadedGraph& backbone, const Manifest& manifest, const Settings& settings,
                             std::int64_t tokens, const std::vector<std::string>& told) {
  const auto& patch = manifest.model->patch_size;
  const std::int64_t grid[3] = {settings.latent_frames / patch[0], settings.latent_height / patch[1],
                                settings.latent_width / patch[2]};
  dims = {{"batch", 1},
          {"frames", settings.latent_frames},
          {"height", settings.latent_height},
          {"width", settings.latent_width},
          {"tokens", grid[0] * grid[1] * grid[2]},
          {"text", tokens}};
  x = backbone.empty("x", dims);
  for (const std::string& name : told) times[name] = backbone.empty(name, dims);
  prompt_embeds = backbone.empty("prompt_embeds", dims);
  for (const char* name : {"rope_cos", "rope_sin"}) rope[name] = backbone.empty(name, dims);
  for (const char* name : {"features", "context"}) passed[name] = backbone.empty(name, dims);
  const auto count = static_cast<std::size_t>(dims["tokens"] * (manifest.model->head_dim / 2));
  rope_tables(grid, manifest.model->head_dim, rope["rope_cos"].values<float>(count),
              rope["rope_sin"].values<float>(count));
  for (const auto& [name, table] : rope) table.upload();
  step = bind(backbone);
}

std::unique_ptr<Step> BoundBackbone::bind(LoadedGraph& backbone) const {
  Buffers inputs = {{"x", x}, {"prompt_embeds", prompt_embeds}};
  for (const Buffers& others : {times, rope}) inputs.insert(others.begin(), others.end());
  return backbone.bind(inputs, passed);
}

}  // namespace tmd::internal
