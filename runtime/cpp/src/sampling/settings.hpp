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
  // For the kinds "wan" and "tim": descending times that end in 0; a guidance other than 1 takes a second pass.
  std::vector<double> times;
  double guidance = 1.0;
  std::string negative_prompt;
  // For kind "tim": the steps from a time strictly inside the interval have guidance. With a deadline, in seconds,
  // times are the finest that a run may take, or with `scheduled` those that it takes as long as it can. `strength` is
  // the first of them where a run starts from a picture.
  double guidance_interval[2] = {0.0, 1.0}, rho = 0.0;
  std::optional<double> deadline, strength;
  bool scheduled = false;
  std::int64_t label = -1;  // of a model of classes

  int passes() const { return guidance == 1.0 ? 1 : 2; }
  bool guided(double t) const { return guidance != 1.0 && guidance_interval[0] < t && t < guidance_interval[1]; }
  // Evaluations of the whole model in the steps of kind "tim" through `way`.
  double nfe_through(const std::vector<double>& way) const;
};

// Fills what is TMD_DEFAULT from the manifest (a random seed too) and checks the rest; throws Error(USAGE) that says
// what the bundle allows.
Settings resolve_settings(const Manifest& manifest, const tmd_run_options& options);

}  // namespace tmd::internal
