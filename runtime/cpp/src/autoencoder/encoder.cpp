#include "autoencoder/encoder.hpp"

#include "autoencoder/tiles.hpp"

namespace tmd::internal {

std::vector<float> encode_picture(LoadedGraph& encoder, const LatentInfo& geometry, const std::uint8_t* rgb,
                                  std::int64_t width, std::int64_t height, bool in_tiles, Progress& progress) {
  const std::int64_t stride = geometry.spatial_stride, channels = geometry.channels;
  Tiling rows(height / stride, stride), columns(width / stride, stride);
  if (!in_tiles)
    for (Tiling* each : {&rows, &columns}) each->tile = each->side, each->starts = {0};
  const Dims dims = {{"batch", 1}, {"frames", 1}, {"height", rows.tile}, {"width", columns.tile}};
  const Buffer frames = encoder.empty("frames", dims), latents = encoder.empty("latents", dims);
  const std::int64_t places = rows.tile * columns.tile;
  const auto pixels = static_cast<std::size_t>(places * stride * stride * 3);
  std::unique_ptr<Step> step;
  progress.timed(TMD_STAGE_LOAD, [&] {  // an engine may compile here
    step = encoder.bind({{"frames", frames}}, {{"latents", latents}});
  });
  const Stopwatch encoding;
  std::vector<float> whole(static_cast<std::size_t>(rows.side * columns.side * channels));  // [h, w, C]
  join_tiles<float>(rows, columns, 1, channels, whole.data(), [&](std::int64_t top, std::int64_t left, float* part) {
    auto* tile = frames.values<std::uint8_t>(pixels);
    const auto line = static_cast<std::size_t>(columns.tile * stride * 3);
    for (std::int64_t y = 0; y < rows.tile * stride; ++y)
      std::memcpy(tile + static_cast<std::size_t>(y) * line, rgb + ((top * stride + y) * width + left * stride) * 3,
                  line);
    frames.upload();
    step->run();
    const std::vector<float> values = latents.read<float>(static_cast<std::size_t>(channels * places));
    for (std::int64_t c = 0; c < channels; ++c)
      for (std::int64_t k = 0; k < places; ++k)
        part[k * channels + c] = values[static_cast<std::size_t>(c * places + k)];
  });
  std::vector<float> found(whole.size());
  const std::int64_t all = rows.side * columns.side;
  for (std::int64_t k = 0; k < all; ++k)
    for (std::int64_t c = 0; c < channels; ++c)
      found[static_cast<std::size_t>(c * all + k)] = whole[static_cast<std::size_t>(k * channels + c)];
  progress.add(TMD_STAGE_ENCODE, encoding.seconds());
  return found;
}

}  // namespace tmd::internal
