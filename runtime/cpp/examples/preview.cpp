// tmd_preview: frames as they come. Draws every piece of the video in the terminal the moment it is decoded.
//
//     tmd_preview BUNDLE "a red circle moving right on a black background"
#include <algorithm>
#include <cstdio>

#include <tmd/tmd.hpp>

namespace {

// One character per two rows of pixels: the upper half block in the colour of the upper row on that of the lower.
void draw(const tmd::Piece& piece, int columns) {
  const int step = std::max(1, piece.width / columns);
  for (int frame = 0; frame < piece.count; ++frame) {
    const std::uint8_t* picture = piece.frames + std::size_t(frame) * std::size_t(piece.width * piece.height * 3);
    std::printf("\x1b[H");
    for (int y = 0; y + step < piece.height; y += 2 * step) {
      for (int x = 0; x < piece.width; x += step) {
        const std::uint8_t* upper = picture + 3 * (y * piece.width + x);
        const std::uint8_t* lower = picture + 3 * ((y + step) * piece.width + x);
        std::printf("\x1b[38;2;%d;%d;%dm\x1b[48;2;%d;%d;%dm\u2580", upper[0], upper[1], upper[2], lower[0], lower[1],
                    lower[2]);
      }
      std::printf("\x1b[0m\n");
    }
    std::printf("frame %d\n", piece.first + frame);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "Usage: tmd_preview BUNDLE PROMPT\n");
    return 2;
  }
  try {
    tmd::Context context(argv[1]);
    tmd::RunOptions options;
    options.pieces = [](const tmd::Piece& piece) {
      draw(piece, 64);
      return true;
    };
    std::printf("\x1b[2J");
    context.generate(argv[2], options, false);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
