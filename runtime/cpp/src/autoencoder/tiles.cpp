#include "autoencoder/tiles.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace tmd::internal {
namespace {

constexpr std::int64_t kTilePixels = 1024, kOverlapPixels = 256;

template <typename T>
T mixed(T before, T after, float share) {
  const float kept = static_cast<float>(before) * (1 - share), added = static_cast<float>(after) * share;
  const float sum = kept + added;
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(std::nearbyint(sum));
  } else {
    return sum;
  }
}

// Where a part lies along one axis: `done` places from 0 on are there already.
struct Span {
  std::int64_t start, length, done;
};

// Puts `part` [outer, span.length, inner] into `whole` [outer, side, inner], fading over what is there.
template <typename T>
void fade(const Span& span, std::int64_t outer, std::int64_t side, std::int64_t inner, T* whole, const T* part) {
  const std::int64_t shared = std::max<std::int64_t>(span.done - span.start, 0);
  for (std::int64_t o = 0; o < outer; ++o) {
    T* to = whole + (o * side + span.start) * inner;
    const T* from = part + o * span.length * inner;
    for (std::int64_t place = 0; place < span.length; ++place, to += inner, from += inner) {
      if (place >= shared) {
        std::copy_n(from, inner, to);
        continue;
      }
      const float share = (static_cast<float>(place) + 0.5f) / static_cast<float>(shared);
      for (std::int64_t k = 0; k < inner; ++k) to[k] = mixed(to[k], from[k], share);
    }
  }
}

}  // namespace

Tiling::Tiling(std::int64_t length, std::int64_t stride) : side(length), tile(std::min(length, kTilePixels / stride)) {
  if (side <= tile) {
    starts = {0};
    return;
  }
  const std::int64_t overlap = kOverlapPixels / stride, fresh = tile - overlap;
  const std::int64_t count = (side - overlap + fresh - 1) / fresh;
  for (std::int64_t k = 0; k < count; ++k)
    starts.push_back(std::llrint(static_cast<double>(k * (side - tile)) / static_cast<double>(count - 1)));
}

template <typename T>
void join_tiles(const Tiling& rows, const Tiling& columns, std::int64_t unit, std::int64_t depth, T* whole,
                const std::function<void(std::int64_t, std::int64_t, T*)>& make) {
  const std::int64_t height = rows.tile * unit, width = columns.tile * unit, across = columns.side * unit;
  std::vector<T> strip(static_cast<std::size_t>(height * across * depth));
  std::vector<T> part(static_cast<std::size_t>(height * width * depth));
  std::int64_t below = 0;
  for (const std::int64_t top : rows.starts) {
    std::int64_t done = 0;
    for (const std::int64_t left : columns.starts) {
      make(top, left, part.data());
      fade<T>({left * unit, width, done}, height, across, depth, strip.data(), part.data());
      done = left * unit + width;
    }
    fade<T>({top * unit, height, below}, 1, rows.side * unit, across * depth, whole, strip.data());
    below = top * unit + height;
  }
}

template void join_tiles(const Tiling&, const Tiling&, std::int64_t, std::int64_t, std::uint8_t*,
                         const std::function<void(std::int64_t, std::int64_t, std::uint8_t*)>&);
template void join_tiles(const Tiling&, const Tiling&, std::int64_t, std::int64_t, float*,
                         const std::function<void(std::int64_t, std::int64_t, float*)>&);

}  // namespace tmd::internal
