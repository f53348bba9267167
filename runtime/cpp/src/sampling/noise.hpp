// Gaussian noise equal to torch's seeded CPU generator and, bit for bit, to Python's `tmd_runtime.sampling.noise`.
//
// Only operations that IEEE 754 fixes to the last bit (+ - * / sqrt floor, rounding to float) occur here, never a libm
// function. The file must be compiled without contraction of a*b+c (-ffp-contract=off) and without -ffast-math.
// How torch draws is told in runtime/tmd_runtime/sampling/noise.py; both are held to runtime/golden/noise.txt.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace tmd::internal {

// MT19937 as its authors' init_genrand(seed) leaves it.
class MersenneTwister {
 public:
  explicit MersenneTwister(std::uint32_t seed);
  std::uint32_t next();

 private:
  void refill();
  std::array<std::uint32_t, 624> state_;
  std::size_t position_ = 624;
};

// The normals of successive torch.randn(..., generator=g) calls; torch uses the low 32 bits of a seed, so do we.
class NoiseStream {
 public:
  explicit NoiseStream(std::uint64_t seed) : words_(static_cast<std::uint32_t>(seed)) {}
  // One draw of `count` values. Two draws of 8 are not one draw of 16, in torch neither.
  void normal(float* out, std::size_t count);

 private:
  void fill_block(float* out);
  double single();

  MersenneTwister words_;
  double kept_sine_ = 0.0;
  bool has_sine_ = false;
};

double exact_log(double x);                                      // normal positive x, within 2 ulp
void exact_sin_cos(double angle, double* sine, double* cosine);  // angle in 0..2 pi, absolute error below 1e-15

}  // namespace tmd::internal
