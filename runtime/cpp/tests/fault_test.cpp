// Out of memory at every place: each allocation that this library's own code makes fails once, and every call answers
// with a status and works afterwards.
//
// Not tested: how the engine, sentencepiece or the standard library's own code take it. Only allocations that are asked
// for from this program's text count, which the static library is part of.
#include <tmd/tmd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

extern "C" {
extern char __executable_start, etext;
void* __real_aligned_alloc(std::size_t alignment, std::size_t size);
void* __wrap_aligned_alloc(std::size_t alignment, std::size_t size);
}

namespace {

long countdown = -1;  // the allocation that fails; below 0: none
long made = 0;

bool fails(const void* caller) {
  const char* at = static_cast<const char*>(caller);
  if (at < &__executable_start || at >= &etext) return false;
  ++made;
  return countdown >= 0 && countdown-- == 0;
}

}  // namespace

void* operator new(std::size_t size) {
  void* memory = fails(__builtin_return_address(0)) ? nullptr : std::malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return fails(__builtin_return_address(0)) ? nullptr : std::malloc(size ? size : 1);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void* __wrap_aligned_alloc(std::size_t alignment, std::size_t size) {
  return fails(__builtin_return_address(0)) ? nullptr : __real_aligned_alloc(alignment, size);
}

namespace {

int failures = 0;

// Runs `work` with each of its allocations failing in turn, the later ones in growing steps.
template <typename Work>
void inject(const char* name, const Work& work, double growth) {
  const tmd_status first = work();  // what is made once and kept is made here
  made = 0;
  if (first != TMD_OK || work() != TMD_OK) {
    std::fprintf(stderr, "%s fails without a fault\n", name);
    ++failures;
    return;
  }
  const long total = made;
  long runs = 0, refused = 0;
  for (double next = 0; next < static_cast<double>(total); next += 1 + next * growth) {
    countdown = static_cast<long>(next);
    const tmd_status status = work();
    const bool reached = countdown < 0;
    countdown = -1;
    ++runs;
    refused += status == TMD_ERROR_MEMORY;
    if (reached && status == TMD_OK) continue;  // something that may be had without, such as a hint in an error text
    if (status != TMD_ERROR_MEMORY && status != TMD_OK) {
      std::fprintf(stderr, "%s, allocation %ld of %ld: %s\n", name, static_cast<long>(next), total,
                   tmd_status_name(status));
      ++failures;
    }
  }
  if (work() != TMD_OK) {
    std::fprintf(stderr, "%s does not work after the faults\n", name);
    ++failures;
  }
  if (refused < runs / 2) {
    std::fprintf(stderr, "%s: only %ld of %ld faults were noticed\n", name, refused, runs);
    ++failures;
  }
  std::printf("%s: %ld allocations, %ld faults, %ld answered with TMD_ERROR_MEMORY\n", name, total, runs, refused);
}

}  // namespace

int main() {
  tmd_context* tmd = nullptr;
  inject(
      "create",
      [&] {
        tmd_context* made_here = nullptr;
        const tmd_status status = tmd_create(&made_here);
        tmd_free(made_here);
        return status;
      },
      0);
  if (tmd_create(&tmd) != TMD_OK) return 1;
  tmd_open_options open;
  tmd_open_options_init(&open);
  open.threads = 1;
  open.engine = std::getenv("TMD_TEST_ENGINE");  // "openvino", "onnxruntime"
  inject(
      "open", [&] { return tmd_open(tmd, TMD_TEST_BUNDLE, &open); }, 0.2);
  tmd_run_options run;
  tmd_run_options_init(&run);
  run.seed = 1;
  run.frames = 5;
  std::vector<unsigned char> frames(5 * 64 * 64 * 3);
  const auto generate = [&] { return tmd_generate(tmd, "a red circle", &run, frames.data(), frames.size(), nullptr); };
  inject("generate, warm", generate, 0.1);
  inject(
      "generate, cold",
      [&] {
        const long saved = countdown;
        countdown = -1;
        tmd_unload(tmd);
        countdown = saved;
        return generate();
      },
      0.3);
  inject(
      "clone",
      [&] {
        tmd_context* clone = nullptr;
        const tmd_status status = tmd_clone(tmd, &clone);
        tmd_free(clone);
        return status;
      },
      0);
  // A Transition Model, with a preview and a picture to start from.
  std::vector<float> init(16 * 8 * 8);
  const auto encode = [&] { return tmd_encode_image(tmd, frames.data(), 64, 64, init.data(), init.size(), nullptr); };
  if (tmd_open(tmd, TMD_TEST_STILLS, &open) != TMD_OK) return 1;
  inject("encode a picture", encode, 0.2);
  run.frames = TMD_DEFAULT;
  run.steps = 3;
  run.rho = 0.5;
  run.strength = 0.7;
  run.init_latents = init.data();
  run.on_preview = [](void*, const std::uint8_t*, std::int32_t, std::int32_t, std::int32_t, std::int32_t) { return 0; };
  inject("generate a still, warm", generate, 0.1);
  tmd_free(tmd);
  return failures != 0;
}
