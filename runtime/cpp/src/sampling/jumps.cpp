#include "sampling/jumps.hpp"

#include <string>

#include "base/error.hpp"

namespace tmd::internal {
namespace {

constexpr double kMaxDeadline = 86400;  // a day, in seconds

}  // namespace

void resolve_jumps(const SamplerInfo& sampler, const tmd_run_options& options,
                   const std::function<std::vector<double>(std::int64_t steps)>& grid, double start, const char* ends,
                   Settings& settings) {
  if (options.deadline == 0 || options.deadline > kMaxDeadline)
    refuse_usage("this deadline is out of range: choose above 0, up to 86400 seconds.");
  if (options.deadline > 0 && options.on_preview)
    refuse_usage("previews take time that a deadline cannot plan with: leave the preview or the deadline out.");
  if (options.schedule && options.steps != TMD_DEFAULT)
    refuse_usage("a schedule says how many steps there are: leave the steps out.");
  if (options.deadline > 0) settings.deadline = options.deadline;
  settings.scheduled = options.schedule != nullptr;
  settings.steps = options.schedule               ? std::int64_t{options.schedule_count} - 1
                   : options.steps != TMD_DEFAULT ? options.steps
                   : settings.deadline            ? kMaxSteps
                                                  : sampler.steps;
  if (!options.schedule || settings.steps > kMaxSteps) check_steps(settings.steps, sampler);
  settings.times = options.schedule ? std::vector<double>(options.schedule, options.schedule + options.schedule_count)
                                    : grid(settings.steps);
  bool falls = settings.times.size() > 1 && settings.times.front() == start && settings.times.back() == 0;
  for (std::size_t k = 1; k < settings.times.size(); ++k) falls = falls && settings.times[k] < settings.times[k - 1];
  if (!falls)
    refuse_usage(std::string("the times of a schedule must fall from ") + (start == 1 ? "1 (noise)" : "the strength") +
                 " to 0 (" + ends + "), such as 1, 0.6, 0.2, 0.");
}

}  // namespace tmd::internal
