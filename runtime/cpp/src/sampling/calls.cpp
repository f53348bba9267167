#include "sampling/calls.hpp"

namespace tmd::internal {

void Launches::run(const std::vector<Calls*>& stages, const Piece& piece, std::int64_t key) {
  if (recorded_ && recorded_->key == key && launch(stages)) return;
  if (records() && !refused_) {
    record(stages, piece, key);
  } else {
    piece([](Calls& stage, Step& step, bool counts) { stage(step, counts); });
  }
}

bool Launches::launch(const std::vector<Calls*>& stages) const {
  const Stopwatch clock;
  if (!recorded_->launch->run_if_valid()) return false;
  const double seconds = clock.seconds();
  // Every step is reported, so that the fraction is right; a stop takes effect here, after all of them.
  for (std::size_t k = 0; k < stages.size(); ++k) stages[k]->took(seconds * recorded_->shares[k], recorded_->counts[k]);
  return true;
}

void Launches::record(const std::vector<Calls*>& stages, const Piece& piece, std::int64_t key) {
  recorded_.reset();
  auto made = std::make_unique<Recorded>();
  made->key = key;
  std::vector<double> before;
  for (const Calls* stage : stages) {
    before.push_back(stage->seconds());
    made->counts.push_back(-stage->done());
  }
  piece([](Calls& stage, Step& step, bool counts) { stage(step, counts); });
  double all = 0;
  for (std::size_t k = 0; k < stages.size(); ++k) {
    made->counts[k] += stages[k]->done();
    made->shares.push_back(stages[k]->seconds() - before[k]);
    all += made->shares.back();
  }
  for (double& share : made->shares) share /= all > 0 ? all : 1;
  made->launch = graph_->record([&] { piece([](Calls&, Step& step, bool) { step.run(); }); });
  refused_ = !made->launch;
  if (!refused_) recorded_ = std::move(made);
}

}  // namespace tmd::internal
