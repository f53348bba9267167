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
  const std::size_t wanted = static_cast<std::size_t>(geometry_.channels * height * width);
  if (latents_.dtype() != DType::f32 || latents_.count() != wanted)
    fail_run("the decoder of this bundle takes other latents than its manifest says. Export the bundle again.");
  first_frames_ = make_frames(*first_graph_, 1);
  for (const TensorSpec& spec : first_graph_->info().outputs)
    if (begins(spec.name, "cache_")) caches_[0][spec.name] = first_graph_->empty(spec.name, dims_);
  Buffers outputs = caches_[0];
  outputs["frames"] = first_frames_;
  first_ = first_graph_->bind({{"latents", latents_}}, outputs);
}

Buffer Decoder::make_frames(const LoadedGraph& graph, std::int64_t count) const {
  Buffer frames = graph.empty("frames", dims_);
  const std::int64_t stride = geometry_.spatial_stride;
  const Shape wanted = {1, count, dims_.at("height") * stride, dims_.at("width") * stride, 3};
  if (frames.shape() != wanted || frames.dtype() != DType::u8)
    fail_run("the graph " + graph.info().file +
             " of this bundle makes other frames than its manifest promises. Export the bundle again.");
  return frames;
}

void Decoder::bind_step(std::shared_ptr<LoadedGraph> step) {
  const auto shapes = [&](const std::vector<TensorSpec>& specs, const char* other) {
    std::map<std::string, Shape> found;
    for (const TensorSpec& spec : specs) {
      if (spec.name == other) continue;
      std::string name = spec.name;
      const std::size_t end = name.rfind(kNext);
      if (end != std::string::npos && end + std::strlen(kNext) == name.size()) name.resize(end);
      found[name] = spec.resolve(dims_);
    }
    return found;
  };
  std::map<std::string, Shape> wanted;
  for (const auto& [name, buffer] : caches_[0]) wanted[name] = buffer.shape();
  if (shapes(step->info().inputs, "latents") != wanted || shapes(step->info().outputs, "frames") != wanted)
    fail_run(
        "the graphs decoder_first and decoder_step of this bundle do not pass the same caches: they come from "
        "different "
        "exports. Export the bundle again.");
  for (const auto& [name, shape] : wanted) caches_[1][name] = step->empty(name, dims_);
  step_frames_ = make_frames(*step, geometry_.temporal_stride);
  for (int now = 0; now < 2; ++now) {
    Buffers inputs = caches_[now], outputs = {{"frames", step_frames_}};
    inputs["latents"] = latents_;
    for (const auto& [name, buffer] : caches_[1 - now]) outputs[name + kNext] = buffer;
    turns_[now] = step->bind(inputs, outputs);
  }
  step_graph_ = std::move(step);
}

void Decoder::check_last_cache(const Buffers& caches) const {
  // NaN has no face in uint8. The last cache is the input of the last convolution: what went wrong before shows there.
  if (caches.empty()) return;
  const Buffer& cache = caches.rbegin()->second;
  if (cache.dtype() != DType::f32) return;
  cache.download();
  check_finite(TMD_STAGE_DECODE, cache.as<float>(), cache.count());
}

void Decoder::run(const float* latents, std::int64_t frames, const LoadStep& load_step, const Pieces& pieces,
                  Progress& progress) {
  const std::size_t picture = static_cast<std::size_t>(dims_["height"] * dims_["width"]);
  std::int64_t first = 0;
  for (std::int64_t k = 0; k < frames; ++k) {
    if (k && !turns_[1]) bind_step(load_step());
    const Stopwatch step;
    for (std::size_t c = 0; c < static_cast<std::size_t>(geometry_.channels); ++c)
      std::memcpy(latents_.as<float>() + c * picture,
                  latents + (c * static_cast<std::size_t>(frames) + static_cast<std::size_t>(k)) * picture,
                  picture * sizeof(float));
    latents_.upload();
    (k ? turns_[(k - 1) % 2] : first_)->run();
    check_last_cache(caches_[k % 2]);
    const Buffer& pictures = k ? step_frames_ : first_frames_;
    pictures.download();
    const std::int64_t count = k ? geometry_.temporal_stride : 1;
    const double seconds = step.seconds();
    progress.add(TMD_STAGE_DECODE, seconds);
    pieces(pictures.as<std::uint8_t>(), first, count);
    progress.report(TMD_STAGE_DECODE, k + 1, frames, seconds);
    first += count;
  }
}

}  // namespace tmd::internal
