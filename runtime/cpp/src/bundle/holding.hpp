// How an engine on a CPU holds a graph in memory, for estimates: the twin of tmd_engines/holding.py.
#pragma once

#include <cstdint>

namespace tmd::internal {

// A weight of 16 bits that takes more than this as float32, and that only products of matrices read, may stay as it is
// stored and be widened whenever it is read.
inline constexpr std::uint64_t kWidenedBytes = 1 << 20;

struct Holding {
  bool widens_bfloat16;            // as float16 is: float32 in memory
  bool keeps_products;             // but for such weights
  std::uint64_t float16_weights;   // how many times a weight of float16 is there, in float32
  bool copies_inputs;              // a graph's inputs are in its own memory once more
  std::uint64_t arena_halves;  // what it takes for the tensors between the nodes, in halves of the most that is alive
  std::uint64_t program;       // of its library, and of what it makes of a graph beside the weights, in bytes
};

inline constexpr Holding kOnnxRuntimeHolding = {true, true, 1, false, 3, 0};
inline constexpr Holding kOpenVinoHolding = {false, false, 2, true, 2, 150'000'000};

}  // namespace tmd::internal
