// The few numbers that drive the loop: time grids and RoPE tables. The twin of tmd_runtime/sampling/schedule.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tmd::internal {

inline constexpr std::int64_t kRopePositions = 1024;  // per axis; no model has seen more

// 0 = t_0 < ... < t_steps = t_max: k/steps warped by t = shift t' / ((shift - 1) t' + 1), the last one held at t_max.
// Throws Error(RUN) if so many steps do not fit below t_max.
std::vector<double> shift_grid(std::int64_t steps, double shift, double t_max);

// The grids of a velocity model by their names in a manifest, noise to data: `steps` times, then 0.
std::vector<double> make_grid(const std::string& name, std::int64_t steps, double shift);

// Wan2.1's own grid, noise to data: `steps` equispaced times from 0.999, warped as above, then 0.
std::vector<double> wan_grid(std::int64_t steps, double shift);

// The time that the network is told at time t: 1000 t as it is ("none"), cut off ("integer"), rounded to an integer
// ("nearest") or to bfloat16, divided by 1000 again.
double told_time(double t, const std::string& rounding);

// Cosine and sine of Wan's three-axis rotary embedding for tokens in the order t, h, w (w fastest), each
// [grid_t * grid_h * grid_w, head_dim / 2], written to `cosine` and `sine`. Throws Error(RUN) for an empty or too long
// grid.
void rope_tables(const std::int64_t (&grid)[3], std::int64_t head_dim, float* cosine, float* sine);

// The same of a Transition Model's two-axis embedding, [grid_h * grid_w, head_dim / 2]: token k has the positions
// (k mod grid_h, k div grid_h) for `rope` "index", and (column, row) for "grid". Throws Error(RUN) as above.
void tim_rope_tables(std::int64_t grid_h, std::int64_t grid_w, std::int64_t head_dim, const std::string& rope,
                     float* cosine, float* sine);

}  // namespace tmd::internal
