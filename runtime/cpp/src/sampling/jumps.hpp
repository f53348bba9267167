// Settings of models that jump from any time to any earlier one: a number of steps, a list of times, a deadline. The
// twin of tmd_runtime.sampling.jumps.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "sampling/settings.hpp"

namespace tmd::internal {

// Fills deadline, scheduled, steps and times: those of `grid(steps)`, or the wished schedule, falling from `start` to
// 0, which `ends` with. A deadline alone allows the most steps. Throws Error(USAGE).
void resolve_jumps(const SamplerInfo& sampler, const tmd_run_options& options,
                   const std::function<std::vector<double>(std::int64_t steps)>& grid, double start, const char* ends,
                   Settings& settings);

}  // namespace tmd::internal
