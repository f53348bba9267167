// How a loop calls its graphs: timed by stage, counted for the callback, and in one launch where the engine can; the
// twin of tmd_runtime.sampling.calls.
//
// A loop writes an outer step down once, as a function of `call`:
//
//     const Piece transition = [&](const Call& call) {
//       call(backbone, *step, true);
//       for (std::size_t j = inner; j > 0; --j) call(flow_head, flow.step(j), true);
//       call(flow_head, *update, false);
//     };
//
// Launches::run runs it call by call. An engine that records runs it so once, and from then on as one launch; again
// call by call where the launch has become void.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "base/progress.hpp"
#include "engines/engine.hpp"
#include "sampling/noise.hpp"

namespace tmd::internal {

// The calls of one stage in one run, `total` of them for whoever watches.
class Calls {
 public:
  Calls(Progress& progress, tmd_stage stage, std::int64_t total) : progress_(progress), stage_(stage), total_(total) {}

  // Runs a step of the stage; one that `counts` is a step to whoever watches. Throws Error(CANCELLED).
  void operator()(Step& step, bool counts = true) {
    const Stopwatch clock;
    step.run();
    took(clock.seconds(), counts ? 1 : 0);
  }
  // Notes time that the stage took for so many of its steps, which are over.
  void took(double seconds, std::int64_t counts) {
    seconds_ += seconds;
    progress_.add(stage_, seconds);
    for (std::int64_t k = 0; k < counts; ++k)
      progress_.report(stage_, ++done_, total_, seconds / static_cast<double>(counts));
  }
  // The stage will have `total` steps, more or less than was expected.
  void expect(std::int64_t total) {
    progress_.expect(total - total_);
    total_ = total;
  }
  double seconds() const { return seconds_; }
  std::int64_t done() const { return done_; }

 private:
  Progress& progress_;
  tmd_stage stage_;
  std::int64_t total_, done_ = 0;
  double seconds_ = 0;
};

// The noise of one run, from its seed's stream. Its draws count as the stage `noise`.
class Draws {
 public:
  Draws(std::int64_t seed, std::size_t count, Progress& progress)
      : stream_(static_cast<std::uint64_t>(seed)), count_(count), progress_(progress) {}

  // Fills a buffer with the next draw, of this deviation; one of several rows with the same in each.
  void into(const Buffer& buffer, double deviation = 1.0, std::size_t rows = 1) {
    progress_.timed(TMD_STAGE_NOISE, [&] {
      float* values = buffer.values<float>(rows * count_);
      stream_.normal(values, count_);
      if (deviation != 1)
        for (std::size_t k = 0; k < count_; ++k) values[k] *= static_cast<float>(deviation);
      for (std::size_t row = 1; row < rows; ++row) std::memcpy(values + row * count_, values, count_ * sizeof(float));
      buffer.upload();
    });
  }

 private:
  NoiseStream stream_;
  std::size_t count_;
  Progress& progress_;
};

using Call = std::function<void(Calls& stage, Step& step, bool counts)>;
using Piece = std::function<void(const Call& call)>;

// Runs a piece of a loop call by call, or as one launch where its engine records; keeps the latest launch.
class Launches {
 public:
  explicit Launches(std::shared_ptr<LoadedGraph> graph) : graph_(std::move(graph)) {}

  // Whether pieces become launches: what the host writes within them must lie in buffers of its own then.
  bool records() const { return graph_->records(); }

  // Runs `piece`, whose calls belong to `stages`; pieces of the same `key` make the same calls on the same buffers. A
  // launch cannot be timed within: each stage gets the share that it had when the piece ran call by call.
  void run(const std::vector<Calls*>& stages, const Piece& piece, std::int64_t key);

 private:
  struct Recorded {
    std::int64_t key;
    std::unique_ptr<Step> launch;
    std::vector<double> shares;
    std::vector<std::int64_t> counts;
  };
  bool launch(const std::vector<Calls*>& stages) const;
  void record(const std::vector<Calls*>& stages, const Piece& piece, std::int64_t key);

  std::shared_ptr<LoadedGraph> graph_;
  std::unique_ptr<Recorded> recorded_;
  bool refused_ = false;  // what the engine cannot record once, it is not asked for again
};

}  // namespace tmd::internal
