// Velocity rules: what one step makes of x and of the velocity v = noise - data that a model gives for it. The twin of
// tmd_engines.bundle.families.rules: double, with the same operations in the same order.
//
// x_t = (1 - t) data + t noise; a step goes from t to the next time t', the last one to 0. A rule is a pure function to
// the factors of a sum, which the graph `update` computes: x_next = c_x x + c_v v + c_noise noise + c_1 m' + c_2 m'',
// with m' and m'' the data predictions x - t v of the step before and of the one before that.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace tmd::internal {

// Factors of x, the velocity, fresh noise and the data predictions of the latest two steps.
struct Coefficients {
  double x, velocity, noise = 0, before_1 = 0, before_2 = 0;
};

// (times, falling and ending in 0; i) -> the factors of the step from times[i] to times[i + 1]. A step draws fresh
// noise exactly if its factor is not 0.
using Rule = Coefficients (*)(const std::vector<double>& times, std::size_t i);

// The rule of this name, or nullptr.
Rule find_rule(const std::string& name);
// "euler, renoise, unipc".
std::string rule_names();

}  // namespace tmd::internal
