// Will a run fit with every graph loaded? A rough answer, from sizes that the manifest states.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "bundle/manifest.hpp"

namespace tmd::internal {

// Bytes of the whole process at its peak.
struct Need {
  std::uint64_t all = 0;  // everything that was loaded stays
  std::uint64_t low = 0;  // text encoder, then denoiser, then decoder
};

// Sizes of a run in latents; `rows` of them go through the denoiser at once.
struct LatentSize {
  std::int64_t frames, height, width, rows = 1;
  bool operator==(const LatentSize& other) const {
    return frames == other.frames && height == other.height && width == other.width && rows == other.rows;
  }
};

// What a run will take: weights as float32, which is what a CPU computes in; the buffers around the graphs; and for
// what lies between the nodes of a stage, kActivations times its largest buffer. Python counts that last part node by
// node (tmd_engines/cost/sizing.py); this stays within a factor of two of it.
Need estimate_need(const Manifest& manifest, const LatentSize& size);
inline constexpr std::uint64_t kActivations = 30;  // Wan 1.3B has 28, its VAE 23, the built-in model 20 and 48

// The weights of one graph in memory, in bytes.
std::uint64_t weight_bytes(const Manifest& manifest, const GraphInfo& graph);

// Memory that this process can take without swapping: what the machine has (MemAvailable), or less if a control group
// around the process leaves less; pages of files count as free. Absent where the system does not tell. `root` is where
// /proc and /sys are.
std::optional<std::uint64_t> available_bytes(const std::string& root = "");

}  // namespace tmd::internal
