// A still that is too large for the memory of its decoder, or of its encoder, taken tile by tile; the twin of
// tmd_runtime/autoencoder/tiles.py. All tiles have one size, and where two overlap, one fades into the other.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace tmd::internal {

// A length of a picture in latents, and of its tiles; each begins at least `overlap` before the one before ends.
struct Tiling {
  Tiling(std::int64_t side, std::int64_t stride);  // `stride` pixels per latent
  std::int64_t side, tile;
  std::vector<std::int64_t> starts;
};

// Writes `whole` [rows.side * unit, columns.side * unit, depth], with `unit` pixels per latent for a picture and 1 for
// latents: `make(top, left, part)` is called for each tile, row by row, and writes part [rows.tile * unit, columns.tile
// * unit, depth]; its place is in latents. A mixed uint8 is rounded to the nearest number, ties to even.
template <typename T>
void join_tiles(const Tiling& rows, const Tiling& columns, std::int64_t unit, std::int64_t depth, T* whole,
                const std::function<void(std::int64_t, std::int64_t, T*)>& make);

}  // namespace tmd::internal
