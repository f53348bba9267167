// tmd_two_threads: two prompts at once on one set of weights. The second context is a clone of the first.
//
//     tmd_two_threads BUNDLE "first prompt" "second prompt"
#include <cstdio>
#include <future>

#include <tmd/tmd.hpp>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "Usage: tmd_two_threads BUNDLE PROMPT PROMPT\n");
    return 2;
  }
  try {
    tmd::Context first(argv[1]);
    tmd::Context second = first.clone();
    tmd::RunOptions options;
    options.seed = 1;
    auto other = std::async(std::launch::async, [&] { return second.generate(argv[3], options); });
    const tmd::Video mine = first.generate(argv[2], options);
    const tmd::Video theirs = other.get();
    for (const tmd::Video* video : {&mine, &theirs}) {
      std::uint64_t sum = 0;
      for (const std::uint8_t value : video->frames) sum += value;
      std::printf("%d frames, mean %.3f\n", video->plan.frames, double(sum) / double(video->frames.size()));
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
