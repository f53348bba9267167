#include "autoencoder/decoder.hpp"

namespace tmd::internal {
namespace {

constexpr const char* kNext = "_next";

bool begins(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

}  // namespace

Decoder::Decoder(std::shared_ptr<LoadedGraph> first, const LatentInfo& geometry, std::int64_t height,
                 std::int64_t width)
    : geometry_(geometry),
      dims_({{"batch", 1}, {"frames", 1}, {"height", height}, {"width", width}}),
      first_graph_(std::move(first)) {
  latents_ = first_graph_->empty("latents", dims_);
  first_frames_ = first_graph_->empty("frames", dims_);
  magnitude_ = first_graph_->empty("magnitude", dims_);
  for (const TensorSpec& spec : first_graph_->info().outputs)
    if (begins(spec.name, "cache_")) caches_[0][spec.name] = first_graph_->empty(spec.name, dims_);
  Buffers outputs = caches_[0];
  outputs["frames"] = first_frames_;
  outputs["magnitude"] = magnitude_;
  first_ = first_graph_->bind({{"latents", latents_}}, outputs);
}

void Decoder::bind_step(std::shared_ptr<LoadedGraph> step) {
  for (const auto& [name, cache] : caches_[0]) caches_[1][name] = step->empty(name, dims_);
  step_frames_ = step->empty("frames", dims_);
  for (int now = 0; now < 2; ++now) {
    Buffers inputs = caches_[now], outputs = {{"frames", step_frames_}, {"magnitude", magnitude_}};
    inputs["latents"] = latents_;
    for (const auto& [name, buffer] : caches_[1 - now]) outputs[name + kNext] = buffer;
    turns_[now] = step->bind(inputs, outputs);
  }
  step_graph_ = std::move(step);
}

void Decoder::run(const float* latents, std::int64_t frames, const LoadStep& load_step, const Pieces& pieces,
                  Progress& progress) {
  const auto channels = static_cast<std::size_t>(geometry_.channels);
  const auto places = static_cast<std::size_t>(dims_["height"] * dims_["width"]);
  const auto pixels = places * static_cast<std::size_t>(geometry_.spatial_stride * geometry_.spatial_stride);
  std::int64_t first = 0;
  for (std::int64_t k = 0; k < frames; ++k) {
    if (k && !turns_[1]) {
      std::shared_ptr<LoadedGraph> later = load_step();
      progress.timed(TMD_STAGE_LOAD, [&] { bind_step(std::move(later)); });  // an engine may compile here
    }
    const Stopwatch step;
    float* one = latents_.values<float>(channels * places);
    for (std::size_t c = 0; c < channels; ++c)
      std::memcpy(one + c * places,
                  latents + (c * static_cast<std::size_t>(frames) + static_cast<std::size_t>(k)) * places,
                  places * sizeof(float));
    latents_.upload();
    (k ? turns_[(k - 1) % 2] : first_)->run();
    const std::vector<float> magnitude = magnitude_.read<float>(1);  // in uint8 a NaN could not be seen any more
    check_finite(TMD_STAGE_DECODE, magnitude.data(), magnitude.size());
    const Buffer& pictures = k ? step_frames_ : first_frames_;
    const std::int64_t count = k ? geometry_.temporal_stride : 1;
    const auto* rgb = pictures.values<std::uint8_t>(static_cast<std::size_t>(count) * pixels * 3);
    pictures.download();
    const double seconds = step.seconds();
    progress.add(TMD_STAGE_DECODE, seconds);
    pieces(rgb, first, count);
    progress.report(TMD_STAGE_DECODE, k + 1, frames, seconds);
    first += count;
  }
}

}  // namespace tmd::internal
