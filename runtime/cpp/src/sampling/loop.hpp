// The denoising loops: noise -> latents. Everything of size is allocated and bound when a loop is made for a shape;
// after that a step sets scalars and runs.
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
  const float* picture = nullptr;   // latents, for kind "tim" with settings.strength
  // Gets in each step but the last the latents that the run would end with if it were the last.
  std::function<void(const float*)> on_preview;
};

class Loop {
 public:
  virtual ~Loop() = default;
  // Writes latents [C, T, h, w]. Returns the times that it went through, of kind "tim".
  // Throws Error(CANCELLED) if the callback says so, Error(RUN) if a stage gives NaN or Inf.
  virtual std::vector<double> run(const Start& start, const Settings& settings, Progress& progress, float* latents) = 0;
};

// The loop of the manifest's rule for latents of the settings' shape and prompts of `tokens` tokens.
std::unique_ptr<Loop> make_loop(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone,
                                std::shared_ptr<LoadedGraph> flow_head, const Settings& settings, std::int64_t tokens);

// The loops whose backbone sees x: what they bind alike, and small helpers.
class LoopBuffers {
 protected:
  LoopBuffers(const Manifest& manifest, std::shared_ptr<LoadedGraph> backbone, std::shared_ptr<LoadedGraph> flow_head,
              const Settings& settings, std::int64_t tokens);

  // x - t v: where the velocity leads at time 0.
  std::vector<float> data_estimate(const float* v, double t) const;
  // Throws Error(RUN) if the graph wants other embeddings than [tokens, dim].
  void put_prompt(const Buffer& prompt, const float* embeds) const;
  // Throws Error(RUN) if the backbone gave NaN or Inf. Not asked of a device, where it would cost a copy of all
  // features: NaN in them is NaN in x, which is looked at after every step.
  void check_features() const;

  std::shared_ptr<LoadedGraph> backbone_graph_, flow_head_graph_;
  Dims dims_;
  std::size_t embeds_count_;
  Buffer x_, t_, rope_cos_, rope_sin_, features_, context_;
};

}  // namespace tmd::internal
