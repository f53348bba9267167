// What this machine's processor can do and how much of it this process may use, as Linux says it. The twin of
// tmd_engines.device.cpu; `root` is where /proc and /sys are.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace tmd::internal {

// Whether the CPU sums products of uint8 and int8 exactly (VNNI). Without, pairs of them saturate at 16 bits. As Python
// asks it (tmd_engines.onnxruntime.engine): what one fuses, the other fuses.
bool fast_unsigned_products(const std::string& root = "");

// Processors' worth of time that the control groups around this process leave it (version 2 and version 1); absent
// without a limit.
std::optional<double> cpu_quota(const std::string& root = "");

// Processors that this process may use: those of its affinity, or as many as its container's quota is worth.
std::int32_t usable_cores(const std::string& root = "");

struct Threads {
  std::int32_t count;  // below 0: an engine's own choice
  std::string note;    // for people, if a wish is not granted
};

// The threads of an engine for a bundle of `bytes` and a wish (below 0: nobody said). Frames depend on the number: of a
// small model, as the built-in ones are, every machine gets the same.
Threads resolve_threads(std::uint64_t bytes, std::int32_t wish, const std::string& root = "");

}  // namespace tmd::internal
