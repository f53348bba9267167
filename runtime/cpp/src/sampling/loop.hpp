// A denoising loop: noise -> latents. Everything of size is allocated and bound when a loop is made for a shape; after
// that a step sets scalars and runs.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "base/progress.hpp"
#include "engines/engine.hpp"
#include "sampling/settings.hpp"

namespace tmd::internal {

// What a run starts from.
struct Start {
  const float* embeds = nullptr;    // [tokens, dim]; a model of classes has settings.label
  const float* negative = nullptr;  // for guidance
  const float* picture = nullptr;   // latents, for settings.strength or of the first frame
  // Gets in each step but the last the latents that the run would end with if it were the last.
  std::function<void(const float*)> on_preview;
};

// What a loop made: latents [C, T, h, w], and the times that it went through, from noise to data (empty if the family's
// settings hold no times).
struct Denoised {
  std::vector<float> latents;
  std::vector<double> times;
};

// One of the two transformers of a model that has two.
struct Transformer {
  std::shared_ptr<LoadedGraph> backbone, flow_head;
};

// The graphs of a denoiser. `transformer` loads the second or the first of two; it may call `let_go`, after which
// nothing may hold the graphs of the other one, and free these.
struct Graphs {
  std::shared_ptr<LoadedGraph> backbone, flow_head, update;
  std::function<Transformer(bool second, const std::function<void()>& let_go, Progress& progress)> transformer;
};

class Loop {
 public:
  virtual ~Loop() = default;
  // Throws Error(CANCELLED) if the callback says so, Error(RUN) if a stage gives NaN or Inf.
  virtual Denoised run(const Start& start, const Settings& settings, Progress& progress) = 0;
};

}  // namespace tmd::internal
