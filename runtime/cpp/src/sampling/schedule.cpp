#include "sampling/schedule.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "base/error.hpp"

namespace tmd::internal {
namespace {

constexpr double kRopeBase = 10000.0;

}  // namespace

std::vector<double> shift_grid(std::int64_t steps, double shift, double t_max) {
  std::vector<double> grid(static_cast<std::size_t>(steps) + 1);
  for (std::size_t k = 0; k < grid.size(); ++k) {
    const double t = static_cast<double>(k) / static_cast<double>(steps);
    grid[k] = shift * t / ((shift - 1) * t + 1);
  }
  grid.back() = t_max;
  if (grid[grid.size() - 2] >= t_max)
    fail_run("this bundle allows " + std::to_string(steps) + " steps, which its time grid does not: use fewer.");
  return grid;
}

std::vector<double> wan_grid(std::int64_t steps, double shift) {
  const double step = (0.0 - 0.999) / static_cast<double>(steps);
  std::vector<double> grid;
  for (std::int64_t k = 0; k < steps; ++k) {
    const double t = static_cast<double>(k) * step + 0.999;
    grid.push_back(shift * t / ((shift - 1) * t + 1));
  }
  grid.push_back(0.0);
  return grid;
}

namespace {

// As sampling/schedule.py: diffusers keeps its times in float32.
std::vector<double> warped_grid(std::int64_t steps, double shift, double step, double first) {
  std::vector<double> grid = {static_cast<double>(static_cast<float>(first))};
  for (std::int64_t k = 1; k < steps; ++k) {
    const double t = 1.0 + static_cast<double>(k) * step;
    grid.push_back(static_cast<double>(static_cast<float>(shift * t / ((shift - 1) * t + 1))));
  }
  grid.push_back(0.0);
  return grid;
}

}  // namespace

std::vector<double> make_grid(const std::string& name, std::int64_t steps, double shift) {
  if (name == "diffusers-unipc")
    return warped_grid(steps, shift, (0.001 - 1.0) / static_cast<double>(steps), 1.0 - 1e-6);
  if (name == "diffusers-euler") {
    const double last = shift * 0.001 / ((shift - 1) * 0.001 + 1);
    return warped_grid(steps, shift, (last - 1.0) / static_cast<double>(std::max<std::int64_t>(steps - 1, 1)), 1.0);
  }
  return wan_grid(steps, shift);
}

double told_time(double t, const std::string& rounding) {
  if (rounding == "integer") return std::floor(1000 * t) / 1000;
  if (rounding == "nearest") return std::floor(1000 * t + 0.5) / 1000;
  if (rounding != "bfloat16") return t;
  float value = static_cast<float>(1000 * t);
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7FFFu + (bits >> 16 & 1)) & 0xFFFF0000u;  // nearest, ties to even
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<double>(value) / 1000;
}

void rope_tables(const std::int64_t (&grid)[3], std::int64_t head_dim, float* cosine, float* sine) {
  for (const std::int64_t length : grid)
    if (length < 1 || length > kRopePositions)
      fail_run("a token grid of " + std::to_string(grid[0]) + "x" + std::to_string(grid[1]) + "x" +
               std::to_string(grid[2]) + " has no rotary table: each axis needs 1 to 1024 positions.");
  const std::int64_t dim_hw = 2 * (head_dim / 6), half = head_dim / 2;
  const std::int64_t dims[3] = {head_dim - 2 * dim_hw, dim_hw, dim_hw};
  // One small table per axis: an angle depends on one coordinate only.
  std::vector<float> cos_of[3], sin_of[3];
  for (int axis = 0; axis < 3; ++axis) {
    const std::int64_t pairs = dims[axis] / 2;
    for (std::int64_t position = 0; position < grid[axis]; ++position) {
      for (std::int64_t i = 0; i < pairs; ++i) {
        const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(dims[axis]);
        const double angle = static_cast<double>(position) * std::pow(kRopeBase, exponent);
        cos_of[axis].push_back(static_cast<float>(std::cos(angle)));
        sin_of[axis].push_back(static_cast<float>(std::sin(angle)));
      }
    }
  }
  for (std::int64_t t = 0, row = 0; t < grid[0]; ++t) {
    for (std::int64_t h = 0; h < grid[1]; ++h) {
      for (std::int64_t w = 0; w < grid[2]; ++w, ++row) {
        const std::int64_t at[3] = {t, h, w};
        std::int64_t column = row * half;
        for (int axis = 0; axis < 3; ++axis) {
          const std::int64_t pairs = dims[axis] / 2;
          for (std::int64_t i = 0; i < pairs; ++i, ++column) {
            cosine[column] = cos_of[axis][static_cast<std::size_t>(at[axis] * pairs + i)];
            sine[column] = sin_of[axis][static_cast<std::size_t>(at[axis] * pairs + i)];
          }
        }
      }
    }
  }
}

void tim_rope_tables(std::int64_t grid_h, std::int64_t grid_w, std::int64_t head_dim, const std::string& rope,
                     float* cosine, float* sine) {
  if (head_dim % 4 || std::min(grid_h, grid_w) < 1 || std::max(grid_h, grid_w) > kRopePositions)
    fail_run("a token grid of " + std::to_string(grid_h) + "x" + std::to_string(grid_w) + " with heads of " +
             std::to_string(head_dim) + " has no rotary table: each axis needs 1 to 1024 positions.");
  const std::int64_t half = head_dim / 2, pairs = half / 2, side = rope == "index" ? grid_h : grid_w;
  for (std::int64_t token = 0; token < grid_h * grid_w; ++token) {
    for (std::int64_t i = 0; i < half; ++i) {
      const auto position = static_cast<double>(i < pairs ? token % side : token / side);
      const double exponent = -2.0 * static_cast<double>(i % pairs) / static_cast<double>(half);
      const double angle = position * std::pow(kRopeBase, exponent);
      cosine[token * half + i] = static_cast<float>(std::cos(angle));
      sine[token * half + i] = static_cast<float>(std::sin(angle));
    }
  }
}

}  // namespace tmd::internal
