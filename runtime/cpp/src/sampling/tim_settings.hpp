// What the manifest of a Transition Model says, and what a run of one shall do: steps or a list of times, guidance in a
// part of them, rho, a picture. The twin of tmd_runtime.sampling.tim_settings.
#pragma once

#include "sampling/settings.hpp"

namespace tmd::internal {

// All blocks are in `flow_head`.
struct TimModel : ModelInfo {
  std::string rope;          // what the rotary tables count: "index", "grid"
  std::int64_t classes = 0;  // how many numbered classes the model draws in place of a prompt; 0: it takes a prompt
};

// Any number of steps, each a jump from t to the next time of a falling list.
struct TimSampler : SamplerInfo {
  double guidance = 1.0, guidance_interval[2] = {0.0, 1.0}, rho = 0.0;
  std::optional<std::string> negative_prompt;
};

std::shared_ptr<ModelInfo> read_tim_model(Object& object);
std::shared_ptr<const SamplerInfo> read_tim_sampler(Object& object);
void resolve_tim(const Manifest& manifest, const tmd_run_options& options, Settings& settings);

}  // namespace tmd::internal
