// What wan and anyflow share: the sampler of a velocity model, with classifier-free guidance. The twin of `WanLoop` in
// tmd_runtime/sampling/wan.py.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "sampling/backbone.hpp"
#include "sampling/calls.hpp"
#include "sampling/loop.hpp"
#include "sampling/rules.hpp"
#include "sampling/update.hpp"

namespace tmd::internal {

struct WanModel : ModelInfo {
  bool first_frame = false;  // its graphs can hold a picture as the first latent frame of a video
};

// How to sample a model whose output is the velocity at the time it was asked for.
struct WanSampler : SamplerInfo {
  double shift = 1.0;
  std::vector<double> times;  // noise to data, 0 left out; empty: those of `grid`
  std::string grid = "wan";
  std::string time_rounding = "none";
  double init_scale = 1.0, guidance = 1.0;
  std::optional<std::string> negative_prompt;
  // Steps from below the boundary, by what the network is told, are those of the second transformer.
  std::optional<double> boundary, guidance_2;
};

// For the settings of both families; these throw Error(USAGE).
void refuse_inner_steps(const tmd_run_options& options);
double choose_shift(const WanSampler& sampler, const tmd_run_options& options);
// Guidance, with a warning to who asks for it of a model that was distilled to do without.
void resolve_model_guidance(const WanSampler& sampler, const tmd_run_options& options, Settings& settings);

// Both graphs are the transformer, cut in two: the features of the backbone go straight into the rest of it. Of a model
// with two transformers (Wan2.2-A14B) the first one makes the steps of high noise and the second one all others, on the
// same buffers. A model that holds a picture as its first latent frame (Wan2.2-TI2V-5B) is told which frames are held,
// and the update puts the picture back into them.
class WanLoop : public Loop {
 public:
  // `told`: the times that the graphs take.
  WanLoop(const Manifest& manifest, Graphs graphs, const Settings& settings, std::int64_t tokens,
          const std::vector<std::string>& told = {"t"});

  Denoised run(const Start& start, const Settings& settings, Progress& progress) override;

 protected:
  using Jumps = std::function<bool(double& t, double& r)>;  // the next step (t, r); false: there is none

  // Tells the graphs of the step from t to r.
  virtual void tell(double t, double r);
  // The steps of the run. `try_step` takes one that leads nowhere, for the time that it takes; x is lost.
  virtual Jumps jumps(const Settings& settings, Calls& backbone, Calls& flow_head, Progress& progress,
                      const std::function<void()>& try_step);

 private:
  // The graphs of one transformer on the buffers of this loop.
  struct Bound {
    Transformer graphs;
    std::unique_ptr<Step> backbone, flow_head;
    Launches launches;
  };

  std::unique_ptr<Bound> tied(std::unique_ptr<Step> step, Transformer graphs) const;
  Bound& active() const { return *transformers_[second_ ? 1 : 0]; }
  bool is_second(double t) const;
  void turn_to(bool second, Progress& progress);
  Step& update_with(const std::set<std::string>& slots);
  void put_prompts(const Start& start);
  // Holds a picture as the first latent frame of the run; NULL: no frame is held.
  void hold(const float* picture);
  // Puts the picture into x, which is noise, by an update that moves nothing.
  void put_picture();

  WanSampler sampler_;
  Rule rule_;
  std::size_t embeds_count_;
  std::shared_ptr<LoadedGraph> update_;
  decltype(Graphs::transformer) transformer_;

 protected:
  BoundBackbone bound_;

 private:
  Buffer velocity_, prompt_, negative_prompt_, before_step_;
  std::unique_ptr<Bound> transformers_[2];
  bool second_ = false;  // whose turn it is
  Updater updater_;
  Buffers latents_;  // slot of the update -> buffer
  Buffers held_;     // what the updates of a model that holds frames read beside their slots
  std::map<std::int64_t, std::unique_ptr<Step>> updates_;
  std::unique_ptr<Step> update_of_nothing_;
};

}  // namespace tmd::internal
