// What one run shall do: the caller's wishes, completed from the manifest and checked before any graph is loaded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "tmd/tmd.h"

namespace tmd::internal {

struct Settings {
  std::int64_t seed = 0;
  std::int64_t steps = 1, inner_steps = 1;
  std::int64_t frames = 0, width = 0, height = 0, fps = 0;
  double nfe = 0.0;
  std::int64_t channels = 0, latent_frames = 0, latent_height = 0, latent_width = 0;
  std::string warnings;  // one per line
  // For kind "wan": descending times that end in 0; a guidance other than 1 takes a second pass.
  std::vector<double> times;
  double guidance = 1.0;
  std::string negative_prompt;

  int passes() const { return guidance == 1.0 ? 1 : 2; }
};

// Fills what is TMD_DEFAULT from the manifest (a random seed too) and checks the rest; throws Error(USAGE) that says
// what the bundle allows.
Settings resolve_settings(const Manifest& manifest, const tmd_run_options& options);

}  // namespace tmd::internal
