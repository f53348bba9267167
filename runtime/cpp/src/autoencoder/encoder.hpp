// A picture -> the latents that a run may start from.
#pragma once

#include <cstdint>
#include <vector>

#include "base/progress.hpp"
#include "engines/engine.hpp"

namespace tmd::internal {

// Latents [C, h, w] of a picture, uint8 [height, width, 3], whose lengths are multiples of the latents' pixels; with
// `in_tiles` a large one is taken in tiles. Adds the time to `progress`.
std::vector<float> encode_picture(LoadedGraph& encoder, const LatentInfo& geometry, const std::uint8_t* rgb,
                                  std::int64_t width, std::int64_t height, bool in_tiles, Progress& progress);

}  // namespace tmd::internal
