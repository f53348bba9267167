#include "sampling/noise.hpp"

#include <cmath>
#include <cstring>

namespace tmd::internal {
namespace {

static_assert(sizeof(double) == 8 && sizeof(float) == 4, "IEEE 754 binary64 and binary32");

constexpr std::size_t kBlock = 16;

// Factorials up to 16! are exact in double, and so the divisions below round once, as Python's do.
constexpr double factorial(int n) { return n <= 1 ? 1.0 : n * factorial(n - 1); }
constexpr double sign(int k) { return k % 2 ? -1.0 : 1.0; }

// log m = 2 (s + s^3/3 + s^5/5 + ...), s = (m - 1)/(m + 1)
constexpr double kLog[11] = {1.0 / 1,  1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9, 1.0 / 11,
                             1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
constexpr double kSin[9] = {sign(0) / factorial(1),  sign(1) / factorial(3),  sign(2) / factorial(5),
                            sign(3) / factorial(7),  sign(4) / factorial(9),  sign(5) / factorial(11),
                            sign(6) / factorial(13), sign(7) / factorial(15), sign(8) / factorial(17)};
constexpr double kCos[9] = {sign(0) / factorial(0),  sign(1) / factorial(2),  sign(2) / factorial(4),
                            sign(3) / factorial(6),  sign(4) / factorial(8),  sign(5) / factorial(10),
                            sign(6) / factorial(12), sign(7) / factorial(14), sign(8) / factorial(16)};
// In two pieces: the first has at least 20 trailing zero bits, so that its product with a small integer is exact.
constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kHalfPiHigh = 0x1.921fb54400000p+0, kHalfPiLow = 0x1.0b4611a626331p-34;
constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
constexpr double kTwoPi = 0x1.921fb54442d18p+2;
constexpr std::int64_t kSqrt2Mantissa = 0x6A09E667F3BCD;

template <std::size_t N>
double polynomial(double x, const double (&coefficients)[N]) {
  // Horner's rule, highest power first; the order of operations is part of the promise.
  double result = coefficients[N - 1];
  for (std::size_t k = N - 1; k-- > 0;) {
    result = result * x;
    result = result + coefficients[k];
  }
  return result;
}

}  // namespace

double exact_log(double x) {
  std::int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::int64_t mantissa = bits & 0xFFFFFFFFFFFFF;
  // A mantissa of sqrt 2 or more is halved, so that m lies around 1 and log m loses no digits near x = 1.
  const std::int64_t halve = mantissa >= kSqrt2Mantissa ? 1 : 0;
  const std::int64_t exponent = (bits >> 52) - 0x3FF + halve;
  const std::int64_t m_bits = mantissa | ((0x3FF - halve) << 52);
  double m;
  std::memcpy(&m, &m_bits, sizeof m);
  const double s = (m - 1.0) / (m + 1.0);
  const double log_m = (s + s) * polynomial(s * s, kLog);
  const double e = static_cast<double>(exponent);
  return e * kLn2High + (e * kLn2Low + log_m);
}

void exact_sin_cos(double angle, double* sine, double* cosine) {
  const double quarter = std::floor(angle * kTwoOverPi + 0.5);
  const double x = (angle - quarter * kHalfPiHigh) - quarter * kHalfPiLow;
  const double x2 = x * x;
  const double s = x * polynomial(x2, kSin);
  const double c = polynomial(x2, kCos);
  const int turn = static_cast<int>(static_cast<std::int64_t>(quarter) & 3);
  const double s_out = turn & 1 ? c : s;
  const double c_out = turn & 1 ? s : c;
  *sine = turn >= 2 ? -s_out : s_out;
  *cosine = turn == 1 || turn == 2 ? -c_out : c_out;
}

MersenneTwister::MersenneTwister(std::uint32_t seed) {
  state_[0] = seed;
  for (std::uint32_t i = 1; i < 624; ++i) {
    const std::uint32_t before = state_[i - 1];
    state_[i] = 1812433253u * (before ^ (before >> 30)) + i;
  }
}

void MersenneTwister::refill() {
  for (std::size_t i = 0; i < 624; ++i) {
    const std::uint32_t y = (state_[i] & 0x80000000u) | (state_[(i + 1) % 624] & 0x7FFFFFFFu);
    state_[i] = state_[(i + 397) % 624] ^ (y >> 1) ^ (y & 1 ? 0x9908B0DFu : 0u);
  }
  position_ = 0;
}

std::uint32_t MersenneTwister::next() {
  if (position_ == 624) refill();
  std::uint32_t y = state_[position_++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9D2C5680u;
  y ^= (y << 15) & 0xEFC60000u;
  return y ^ (y >> 18);
}

void NoiseStream::normal(float* out, std::size_t count) {
  if (count < kBlock) {
    for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>(single());
    return;
  }
  const std::size_t whole = count / kBlock, rest = count % kBlock;
  for (std::size_t i = 0; i < whole; ++i) fill_block(out + i * kBlock);
  if (rest) {
    // Torch draws a uniform for every value first, the incomplete block included, and only then the 16 for the tail.
    for (std::size_t i = 0; i < rest; ++i) words_.next();
    fill_block(out + count - kBlock);
  }
}

void NoiseStream::fill_block(float* out) {
  std::uint32_t word[kBlock];
  for (std::uint32_t& w : word) w = words_.next() & 0xFFFFFFu;
  for (std::size_t j = 0; j < 8; ++j) {
    const double u = static_cast<double>(word[j]) * 0x1p-24;
    const double radius = std::sqrt(-2.0 * exact_log(1.0 - u));
    // Torch's angle is a float product; following its rounding keeps the far tails within 1e-6 of it.
    const float angle = static_cast<float>(static_cast<double>(word[j + 8]) * 0x1p-24) * static_cast<float>(kTwoPi);
    double sine, cosine;
    exact_sin_cos(static_cast<double>(angle), &sine, &cosine);
    out[j] = static_cast<float>(radius * cosine);
    out[j + 8] = static_cast<float>(radius * sine);
  }
}

double NoiseStream::single() {
  if (has_sine_) {
    has_sine_ = false;
    return kept_sine_;
  }
  double uniform[2];
  for (double& u : uniform) {
    const std::uint64_t high = words_.next();
    const std::uint64_t low = words_.next();
    u = static_cast<double>((high << 32 | low) & ((std::uint64_t{1} << 53) - 1)) * 0x1p-53;
  }
  const double radius = std::sqrt(-2.0 * exact_log(1.0 - uniform[1]));
  double sine, cosine;
  exact_sin_cos(kTwoPi * uniform[0], &sine, &cosine);
  kept_sine_ = radius * sine;
  has_sine_ = true;
  return radius * cosine;
}

}  // namespace tmd::internal
