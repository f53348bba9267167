// What the stand-ins for NVIDIA's libraries know of each other: a stream that can record, and which memory is the
// device's.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

using Work = std::vector<std::function<void()>>;

struct CUstream_st {
  bool recording = false;
  Work recorded;
};

#pragma GCC visibility push(default)
extern "C" {
bool fake_cuda_is_on_device(const void* address, std::size_t size);  // from the beginning of a piece of memory
}
#pragma GCC visibility pop
