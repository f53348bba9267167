// Update rules for models that predict the velocity v = noise - data: what one step makes of x.
//
// The twin of tmd_runtime/sampling/rules.py: scalars in double, latents in float, each product and each sum rounded to float in
// the same order, so that both give the same bits.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "sampling/noise.hpp"

namespace tmd::internal {

class Rule {
 public:
  virtual ~Rule() = default;
  virtual bool draws() const { return false; }  // whether a step draws noise
  // A run through `times`, descending and ending in 0, on latents of `count` values.
  void start(std::vector<double> times, std::size_t count, NoiseStream* stream) {
    times_ = std::move(times);
    count_ = count;
    stream_ = stream;
    prepare();
  }
  // Moves x from times[i] to times[i + 1] in place, v its velocity. v is working space afterwards.
  virtual void step(std::size_t i, float* x, float* v) = 0;

 protected:
  virtual void prepare() {}
  std::vector<double> times_;
  std::size_t count_ = 0;
  NoiseStream* stream_ = nullptr;
};

// "euler", "renoise" or "unipc".
std::unique_ptr<Rule> make_rule(const std::string& name);

}  // namespace tmd::internal
