// Flow maps (AnyFlow): the graphs are told where a step goes to, and any list of times leads from noise to data. The
// twin of tmd_runtime/sampling/anyflow.py.
#include "sampling/deadline.hpp"
#include "sampling/family.hpp"
#include "sampling/jumps.hpp"
#include "sampling/schedule.hpp"
#include "sampling/wan.hpp"

namespace tmd::internal {
namespace {

// 1 to 0 in equal steps.
std::vector<double> uniform_times(std::int64_t steps) {
  std::vector<double> times;
  for (std::int64_t k = 0; k <= steps; ++k) times.push_back(1 - static_cast<double>(k) / static_cast<double>(steps));
  return times;
}

double warp(double t, double shift) { return shift * t / (1 + (shift - 1) * t); }

// x_r = x_t - (t - r) u(x_t, t, r), step by step (arXiv 2605.13724).
class AnyFlowLoop : public WanLoop {
 public:
  AnyFlowLoop(const Manifest& manifest, Graphs graphs, const Settings& settings, std::int64_t tokens)
      : WanLoop(manifest, std::move(graphs), settings, tokens, {"t", "r"}) {}

 protected:
  void tell(double t, double r) override {
    bound_.times["t"].fill(static_cast<float>(t));
    bound_.times["r"].fill(static_cast<float>(r));
  }

  Jumps jumps(const Settings& settings, Calls& backbone, Calls& flow_head, Progress& progress,
              const std::function<void()>& try_step) override {
    if (!settings.deadline) return WanLoop::jumps(settings, backbone, flow_head, progress, try_step);
    const Stopwatch clock;
    StepTimes& costs = costs_[settings.passes() - 1];
    const double spent = measure(costs, *settings.deadline, try_step);
    progress.add(TMD_STAGE_LOAD, spent);  // only a first run has it
    const double end = *settings.deadline + spent;
    const bool planned = !settings.scheduled;
    const std::vector<double> grid = planned ? uniform_times(settings.steps) : settings.times;
    // The step that began at `began` is over when the next one is asked for.
    return [&settings, &backbone, &flow_head, &costs, clock, end, planned, grid, at = grid.front(),
            done = std::int64_t{0}, began = 0.0](double& t, double& r) mutable {
      if (done) costs.add(clock.seconds() - began);
      if (at <= 0) return false;
      const double cost = costs.cost(), left = end - clock.seconds();
      const double to = next_time(grid, settings.scheduled, at, settings.steps - done, left, cost, cost);
      ++done;
      const std::int64_t total = done + steps_ahead(at, to, done, settings.steps, planned);
      for (Calls* calls : {&backbone, &flow_head}) calls->expect(total * settings.passes());
      t = planned ? warp(at, settings.shift) : at;
      r = planned ? warp(to, settings.shift) : to;
      at = to;
      began = clock.seconds();
      return true;
    };
  }

 private:
  StepTimes costs_[2];  // without guidance, with
};

class AnyFlow : public RuntimeFamily {
 public:
  const char* name() const override { return "anyflow"; }

  std::shared_ptr<const SamplerInfo> read_sampler(Object& object) const override {
    const auto sampler = std::make_shared<WanSampler>();
    sampler->rule = object.need("rule").one_of({"euler"});
    sampler->steps = read_steps(object.need("steps"));
    sampler->shift = object.need("shift").number(1, 1000);
    sampler->guidance = object.need("guidance").number(0, 1000);
    if (const Field prompt = object.maybe("negative_prompt"); !prompt.is_null())
      sampler->negative_prompt = prompt.text();
    return sampler;
  }

  void resolve(const Manifest& manifest, const tmd_run_options& options, Settings& settings) const override {
    refuse_pictures(options);
    const auto& sampler = static_cast<const WanSampler&>(*manifest.sampler);
    refuse_inner_steps(options);
    if (options.shift >= 0 && options.schedule)
      refuse_usage("a schedule says what the times are, and a shift has nothing to warp: leave one out.");
    settings.shift = choose_shift(sampler, options);
    const auto grid = [&](std::int64_t steps) {
      std::vector<double> times = uniform_times(steps);
      for (double& t : times) t = warp(t, settings.shift);
      return times;
    };
    resolve_jumps(sampler, options, grid, 1.0, "the video", settings);
    resolve_model_guidance(sampler, options, settings);
  }

  std::unique_ptr<Loop> make_loop(const Manifest& manifest, Graphs graphs, const Settings& settings,
                                  std::int64_t tokens) const override {
    return std::make_unique<AnyFlowLoop>(manifest, std::move(graphs), settings, tokens);
  }
};

}  // namespace

const RuntimeFamily& anyflow_family() {
  static const AnyFlow family;
  return family;
}

}  // namespace tmd::internal
