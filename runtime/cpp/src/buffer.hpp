// Memory that an engine reads and writes in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "manifest.hpp"

namespace tmd::internal {

using Shape = std::vector<std::int64_t>;

inline std::size_t count_of(const Shape& shape) {
  std::size_t count = 1;
  for (const std::int64_t size : shape)
    if (__builtin_mul_overflow(count, static_cast<std::size_t>(size), &count)) throw std::bad_alloc();
  return count;
}

// A tensor that owns its memory, or shares it with a copy of itself. Aligned for vector instructions, not initialised.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType dtype, Shape shape) : dtype_(dtype), shape_(std::move(shape)) {
    std::size_t bytes;
    if (__builtin_mul_overflow(count_of(shape_), item_size(dtype), &bytes) || bytes > SIZE_MAX / 2)
      throw std::bad_alloc();
    bytes_ = bytes;
    void* memory = std::aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment);
    if (!memory) throw std::bad_alloc();
    memory_ = std::shared_ptr<void>(memory, std::free);
  }

  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  std::size_t bytes() const { return bytes_; }
  std::size_t count() const { return bytes_ / item_size(dtype_); }
  void* data() const { return memory_.get(); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_.get());
  }
  void fill(float value) const {
    for (std::size_t i = 0; i < count(); ++i) as<float>()[i] = value;
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  DType dtype_ = DType::f32;
  Shape shape_;
  std::size_t bytes_ = 0;
  std::shared_ptr<void> memory_;
};

}  // namespace tmd::internal
