// The graph `backbone` of a model that runs it once per step, and the buffers that its graphs share; the twin of
// tmd_runtime.sampling.backbone.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engines/engine.hpp"
#include "sampling/settings.hpp"

namespace tmd::internal {

// Tied to buffers for latents of the settings' shape and prompts of `tokens` tokens. `step` runs it on x, `times` (t,
// and whatever else `told` names) and prompt_embeds; `passed` (features, context) and `rope` are for the flow head;
// `dims` are the sizes behind the symbols of all graphs.
struct BoundBackbone {
  BoundBackbone(LoadedGraph& backbone, const Manifest& manifest, const Settings& settings, std::int64_t tokens,
                const std::vector<std::string>& told = {"t"});
  // The step of another graph with the same interface, on these buffers.
  std::unique_ptr<Step> bind(LoadedGraph& backbone) const;

  Dims dims;
  Buffer x, prompt_embeds;
  Buffers times, rope, passed;
  std::unique_ptr<Step> step;
};

}  // namespace tmd::internal
