#include "sampling/update.hpp"

#include <cmath>

#include "base/progress.hpp"

namespace tmd::internal {
namespace {

// The graph, and its result copied to where it reads: an engine does not write where it reads.
class UpdateStep : public Step {
 public:
  UpdateStep(std::unique_ptr<Step> step, Buffer x, Buffer x_next)
      : step_(std::move(step)), x_(std::move(x)), x_next_(std::move(x_next)) {}
  void run() override {
    step_->run();
    x_.copy(x_next_);
  }

 private:
  std::unique_ptr<Step> step_;
  Buffer x_, x_next_;
};

}  // namespace

Updater::Updater(std::shared_ptr<LoadedGraph> graph, const Buffer& x, const Dims& dims)
    : graph_(std::move(graph)),
      x_(x),
      coefficients_(graph_->empty("coefficients", dims)),
      x_next_(graph_->empty("x_next", dims)),
      data_(graph_->empty("data", dims)),
      magnitude_(graph_->empty("magnitude", dims)) {}

std::unique_ptr<Step> Updater::bind(const Buffer& velocity, const Buffers& others) const {
  Buffers inputs = others;  // what is in there already stays
  inputs.insert({{"x", x_},
                 {"velocity", velocity},
                 {"negative", velocity},
                 {"noise", x_},
                 {"before_1", x_},
                 {"before_2", x_},
                 {"coefficients", coefficients_}});
  return std::make_unique<UpdateStep>(
      graph_->bind(inputs, {{"x_next", x_next_}, {"data", data_}, {"magnitude", magnitude_}}), x_, x_next_);
}

void Updater::set(const Coefficients& factors, double t, double guidance) const {
  const double values[] = {guidance, t, factors.x, factors.velocity, factors.noise, factors.before_1, factors.before_2};
  constexpr std::size_t kCount = sizeof values / sizeof *values;
  float* to = coefficients_.values<float>(kCount);
  for (std::size_t k = 0; k < kCount; ++k) to[k] = static_cast<float>(values[k]);
  coefficients_.upload();
}

void Updater::check(const Buffers& passed, const std::function<void()>& other_pass) const {
  if (std::isfinite(magnitude_.read<float>(1)[0])) return;
  const auto check_passed = [&] {
    for (const auto& [name, buffer] : passed) {
      const std::vector<float> values = buffer.read<float>(buffer.count());
      if (!all_finite(values.data(), values.size())) fail_not_finite(TMD_STAGE_BACKBONE);
    }
  };
  check_passed();
  if (other_pass) {
    other_pass();
    check_passed();
  }
  fail_not_finite(TMD_STAGE_FLOW_HEAD);
}

}  // namespace tmd::internal
