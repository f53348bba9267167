// The graph `update` on the buffers of a loop: x becomes the x of the next time, in one sum of the graph. The twin of
// tmd_runtime.sampling.update.
//
//     v      = negative + guidance (velocity - negative)
//     x_next = c_x x + c_v v + c_noise noise + c_1 before_1 + c_2 before_2
//     data   = x - t v
//
// The host sets the factors (rules.hpp) and copies x_next over x.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "engines/engine.hpp"
#include "sampling/rules.hpp"

namespace tmd::internal {

class Updater {
 public:
  // Of the buffer `x`; `dims` are the sizes behind the symbols of the graph.
  Updater(std::shared_ptr<LoadedGraph> graph, const Buffer& x, const Dims& dims);

  // An update by what `velocity` holds, and `others` of negative, noise, before_1 and before_2.
  //
  // A slot that is not given must have the factor 0 (without negative: guidance 1). It shares a buffer that is finite
  // whenever the update is, because 0 times NaN is NaN.
  std::unique_ptr<Step> bind(const Buffer& velocity, const Buffers& others = {}) const;

  // Sets the factors of the updates to come, and the time t that `data` needs.
  void set(const Coefficients& factors, double t = 0.0, double guidance = 1.0) const;

  // Throws Error(RUN) if x holds NaN or Inf. `passed`, what the backbone made for the flow head, tells which of the two
  // gave it. `other_pass` makes them anew for the other pass of the step, where it had one.
  void check(const Buffers& passed, const std::function<void()>& other_pass = {}) const;

  const Buffer& data() const { return data_; }  // the data prediction of the latest step
  std::vector<float> preview() const { return data_.read<float>(x_.count()); }

 private:
  std::shared_ptr<LoadedGraph> graph_;
  Buffer x_, coefficients_, x_next_, data_, magnitude_;
};

}  // namespace tmd::internal
