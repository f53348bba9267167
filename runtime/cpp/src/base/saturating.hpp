// Sums and products of sizes from an untrusted manifest: what does not fit into 64 bits counts as very large.
#pragma once

#include <cstdint>

namespace tmd::internal {

inline std::uint64_t plus(std::uint64_t a, std::uint64_t b) {
  std::uint64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? UINT64_MAX : sum;
}

inline std::uint64_t times(std::uint64_t a, std::uint64_t b) {
  std::uint64_t product;
  return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX : product;
}

}  // namespace tmd::internal
