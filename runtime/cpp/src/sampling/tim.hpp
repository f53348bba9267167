// The loop of Transition Models (kind "tim"); the twin of tmd_runtime/sampling/tim.py.
#pragma once

#include "sampling/loop.hpp"

namespace tmd::internal {

// For a still of the settings' shape and prompts of `tokens` tokens (of a model of classes, 1).
std::unique_ptr<Loop> make_transition_loop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                                           std::shared_ptr<LoadedGraph> flow_head, const Settings& settings,
                                           std::int64_t tokens);

}  // namespace tmd::internal
