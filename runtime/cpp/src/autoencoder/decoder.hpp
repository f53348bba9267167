// Latents -> frames, one latent frame at a time, so that a video of any length needs the memory of a few frames.
#pragma once

#include <functional>
#include <memory>

#include "base/progress.hpp"
#include "engines/engine.hpp"

namespace tmd::internal {

// Decoder graphs bound to buffers for latent frames of height x width.
class Decoder {
 public:
  using LoadStep = std::function<std::shared_ptr<LoadedGraph>()>;
  // `pieces(rgb, first, count)` gets uint8 [count, H, W, 3]; the memory is valid during the call.
  using Pieces = std::function<void(const std::uint8_t*, std::int64_t, std::int64_t)>;

  Decoder(std::shared_ptr<LoadedGraph> first, const LatentInfo& geometry, std::int64_t height, std::int64_t width);

  // Decodes latents [C, frames, height, width]. `load_step` gives the graph of the later frames when a second one first
  // comes: a single picture does not need it. Throws Error(RUN, CANCELLED).
  void run(const float* latents, std::int64_t frames, const LoadStep& load_step, const Pieces& pieces,
           Progress& progress);

 private:
  void bind_step(std::shared_ptr<LoadedGraph> step);

  LatentInfo geometry_;
  Dims dims_;
  std::shared_ptr<LoadedGraph> first_graph_, step_graph_;
  Buffer latents_, first_frames_, step_frames_, magnitude_;
  Buffers caches_[2];  // the set that a call reads and the set that it writes take turns
  std::unique_ptr<Step> first_, turns_[2];
};

}  // namespace tmd::internal
