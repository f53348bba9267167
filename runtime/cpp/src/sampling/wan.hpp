// The denoising loop of models without inner flow (kind "wan"): one velocity per step, or two with guidance.
#pragma once

#include "sampling/loop.hpp"

namespace tmd::internal {

std::unique_ptr<Loop> make_velocity_loop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                                         std::shared_ptr<LoadedGraph> flow_head, const Settings& settings,
                                         std::int64_t tokens);

}  // namespace tmd::internal
