// Seconds per stage of one call, and its callback, which is told of each step and may stop the call.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>

#include "base/error.hpp"
#include "tmd/tmd.h"

namespace tmd::internal {

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

class Progress {
 public:
  // `expected` steps will be reported, those of TMD_STAGE_LOAD not counted.
  Progress(tmd_progress_fn callback, void* user, std::int64_t expected)
      : callback_(callback), user_(user), expected_(expected) {}

  void add(tmd_stage stage, double seconds) { seconds_[stage] += seconds; }
  double seconds(tmd_stage stage) const { return seconds_[stage]; }
  // Runs `work`, which counts as time of the stage.
  template <typename Work>
  void timed(tmd_stage stage, const Work& work) {
    const Stopwatch clock;
    work();
    add(stage, clock.seconds());
  }
  // So many steps more, or less, than was said will be reported.
  void expect(std::int64_t more) { expected_ += more; }

  // A step is over, its time is added already. Throws Error(CANCELLED) if the callback wants no more.
  void report(tmd_stage stage, std::int64_t step, std::int64_t total, double seconds) {
    if (stage != TMD_STAGE_LOAD) ++done_;
    if (!callback_) return;
    tmd_progress progress{};
    progress.struct_size = sizeof progress;
    progress.stage = stage;
    progress.step = static_cast<std::int32_t>(step);
    progress.total = static_cast<std::int32_t>(total);
    progress.seconds = seconds;
    fraction_ =
        std::max(fraction_, expected_ > done_ ? static_cast<double>(done_) / static_cast<double>(expected_) : 1.0);
    progress.fraction = fraction_;
    if (callback_(user_, &progress) != 0)
      throw Error(TMD_CANCELLED, "the run was stopped by its callback after step " + std::to_string(step) + " of " +
                                     std::to_string(total) + " of the stage " + tmd_stage_name(stage) + ".");
  }

 private:
  tmd_progress_fn callback_;
  void* user_;
  std::int64_t expected_, done_ = 0;
  double fraction_ = 0;
  double seconds_[TMD_STAGES] = {};
};

[[noreturn]] inline void fail_not_finite(tmd_stage stage) {
  fail_run(std::string("the stage ") + tmd_stage_name(stage) +
           " gave NaN or Inf: there is no video to show. Try another engine or a bundle of higher precision (fp32); "
           "if it stays, the weights are damaged: export the bundle again.");
}

inline bool all_finite(const float* values, std::size_t count) {
  // The sum is NaN or Inf exactly if one of them is: float cannot overflow double.
  double total = 0.0;
  for (std::size_t i = 0; i < count; ++i) total += static_cast<double>(values[i]);
  return std::isfinite(total);
}

// Throws Error(RUN) naming the stage if `count` values hold NaN or Inf.
inline void check_finite(tmd_stage stage, const float* values, std::size_t count) {
  if (!all_finite(values, count)) fail_not_finite(stage);
}

}  // namespace tmd::internal
