// What one run shall do: the caller's wishes, completed from the manifest and checked before any graph is loaded.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bundle/manifest.hpp"
#include "tmd/tmd.h"

namespace tmd::internal {

struct Settings {
  std::int64_t seed = 0;
  std::int64_t steps = 1, inner_steps = 1;
  std::int64_t frames = 0, width = 0, height = 0, fps = 0;
  double nfe = 0.0;
  std::int64_t channels = 0, latent_frames = 0, latent_height = 0, latent_width = 0;
  std::string warnings;  // one per line
  // Of a model that steps through a list of times: falling, the last one 0.
  std::vector<double> times;
  // A guidance other than 1 takes the model a second time per step, in the steps from a time inside the interval.
  double guidance = 1.0, guidance_interval[2] = {-1.0, 2.0};
  double guidance_2 = 1.0;  // that of the second transformer, of a model that has two
  std::string negative_prompt;
  // How much of the noise in x a step between the first and the last replaces.
  double rho = 0.0;
  // With a deadline, in seconds, `times` are the finest that a run may take, or with `scheduled` those that it takes as
  // long as it can. `strength` is the first of them where a run starts from a picture.
  std::optional<double> deadline, strength;
  bool scheduled = false;
  double shift = 1.0;  // what the steps of a flow map with a deadline are warped by
  std::int64_t label = -1;  // of a model of classes

  int passes() const { return guidance == 1.0 ? 1 : 2; }
  bool guided(double t) const { return guidance != 1.0 && guidance_interval[0] < t && t < guidance_interval[1]; }
  // resolve_settings has seen that both fit into memory's addresses.
  std::size_t frames_size() const { return static_cast<std::size_t>(frames * height * width * 3); }
  std::size_t latents_count() const {
    return static_cast<std::size_t>(channels * latent_frames * latent_height * latent_width);
  }
};

// Fills what is TMD_DEFAULT from the manifest (a random seed too) and checks the rest; throws Error(USAGE) that says
// what the bundle allows.
Settings resolve_settings(const Manifest& manifest, const tmd_run_options& options);

// For the families, each throws Error(USAGE).
// The wished count, or the manifest's.
std::int64_t choose_steps(const SamplerInfo& sampler, std::int32_t wish);
std::int64_t choose_inner_steps(const SamplerInfo& sampler, std::int32_t wish);
void check_steps(std::int64_t steps, const SamplerInfo& sampler);  // 1 to kMaxSteps
// Guidance and its negative prompt, by default `guidance` and `negative_prompt`.
void resolve_guidance(const tmd_run_options& options, double guidance,
                      const std::optional<std::string>& negative_prompt, Settings& settings);
// What takes a model that jumps from any time to any other; and what only Transition Models grant, but for a picture of
// a model that holds one as the first frame of its video.
void refuse_jumps(const tmd_run_options& options, bool holds_first_frame = false);
void refuse_pictures(const tmd_run_options& options, bool holds_first_frame = false);

}  // namespace tmd::internal
