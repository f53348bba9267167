// Will a run fit with every graph loaded, or one stage after the other? The weights by the sizes of their files, and
// what lies between the nodes by going through the graphs, as Python does it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "bundle/holding.hpp"
#include "bundle/reader.hpp"

namespace tmd::internal {

// Stages of a run, as bits.
using Stages = unsigned;
inline constexpr Stages kText = 1, kDenoise = 2, kDecode = 4, kPicture = 8;

// Bytes of the whole process at its peak.
struct Need {
  std::uint64_t all = 0;         // everything that was loaded stays
  std::uint64_t low = 0;         // text encoder, then denoiser, then decoder
  std::uint64_t sure[4] = {};    // that each stage takes at least, in the order of their bits
  std::uint64_t surely(Stages stages) const;  // the largest of these
};

// Sizes of a run in latents; `rows` of them go through the denoiser at once.
struct LatentSize {
  std::int64_t frames, height, width, rows = 1;
  bool operator==(const LatentSize& other) const {
    return frames == other.frames && height == other.height && width == other.width && rows == other.rows;
  }
};

// What a run will take of an engine that holds graphs like this: weights, the buffers around the graphs, and what lies
// between the nodes of each stage. It stays within a factor of two of what Python counts (tmd_engines/cost/sizing.py),
// which knows the weights better. Throws Error(BUNDLE) for a graph that cannot be sized.
Need estimate_need(const Bundle& bundle, const LatentSize& size, const Holding& holding);

// The weights of one graph in memory, in bytes.
std::uint64_t weight_bytes(const Manifest& manifest, const GraphInfo& graph, const Holding& holding);

// Memory that this process can take without swapping: what the machine has (MemAvailable), or less if a control group
// around the process leaves less; pages of files count as free. Absent where the system does not tell. `root` is where
// /proc and /sys are.
std::optional<std::uint64_t> available_bytes(const std::string& root = "");

}  // namespace tmd::internal
