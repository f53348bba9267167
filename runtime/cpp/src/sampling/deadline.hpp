// Which steps a model takes that jumps from any time to any earlier one, when the time is limited; the twin of
// tmd_runtime/sampling/deadline.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "base/progress.hpp"

namespace tmd::internal {

// What steps have cost lately: the slower one of the latest two counts, in seconds.
class StepTimes {
 public:
  void add(double seconds) {
    before_ = latest_;
    latest_ = seconds;
  }
  bool known() const { return latest_ >= 0; }
  double cost() const { return std::max(before_, latest_); }

 private:
  double before_ = -1, latest_ = -1;
};

// Where the step from t goes, when `left` seconds remain, this step takes `now` of them and each later one at most
// `later`: to the next of `times` (`fixed`), of which `most` are left, or through the first of as many equal steps as
// fit, at most as many as `times` has; to 0 if there is no time for one more.
inline double next_time(const std::vector<double>& times, bool fixed, double t, std::int64_t most, double left,
                        double now, double later) {
  constexpr double kShortest = 1e-6;  // nothing is faster, whatever a clock says
  const double spare = std::max(left - now, 0.0);
  const double fit = std::min(spare / std::max(later, kShortest), static_cast<double>(most - 1));
  const std::int64_t count = 1 + static_cast<std::int64_t>(fit);
  if (count == 1) return 0.0;
  if (fixed) return times[times.size() - static_cast<std::size_t>(most)];
  return t * static_cast<double>(count - 1) / static_cast<double>(count);
}

// Takes a step whose cost is not known. Returns the seconds that this took.
inline double measure(StepTimes& costs, double deadline, const std::function<void()>& step) {
  const auto cost = [&] {
    const Stopwatch clock;
    step();
    return clock.seconds();
  };
  if (costs.known()) return 0;
  const Stopwatch all;
  const double first = cost();
  // The very first one may be slow for reasons that do not come back, and here it would decide.
  costs.add(first > deadline / 10 ? cost() : first);
  return all.seconds();
}

// How many steps will follow the one from t to r, which is number `done` of `steps`; of a run whose steps are `planned`
// as it goes, as far as one can say.
inline std::int64_t steps_ahead(double t, double r, std::int64_t done, std::int64_t steps, bool planned) {
  if (r <= 0) return 0;
  return planned ? std::llround(r / (t - r)) : steps - done;
}

}  // namespace tmd::internal
