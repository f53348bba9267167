// Memory that an engine reads and writes in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "bundle/manifest.hpp"

namespace tmd::internal {

using Shape = std::vector<std::int64_t>;

inline std::size_t count_of(const Shape& shape) {
  std::size_t count = 1;
  for (const std::int64_t size : shape)
    if (__builtin_mul_overflow(count, static_cast<std::size_t>(size), &count)) throw std::bad_alloc();
  return count;
}

inline std::size_t bytes_of(DType dtype, const Shape& shape) {
  std::size_t bytes;
  if (__builtin_mul_overflow(count_of(shape), item_size(dtype), &bytes) || bytes > SIZE_MAX / 2) throw std::bad_alloc();
  return bytes;
}

// Memory of a device, and a copy of it that the host sees. Throws Error(ENGINE).
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual void* address() const = 0;  // on the device
  virtual void* host() = 0;           // the copy; made when it is first asked for
  virtual void upload() = 0;          // the copy goes to the device
  virtual void download() = 0;        // and back
};

// A tensor that owns its memory, or shares it with a copy of itself. Aligned for vector instructions, not initialised.
// An engine of a device has it there: then what the host writes into `data` counts after `upload`, and what a graph has
// written is in `data` after `download`. In the host's own memory these do nothing.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType dtype, Shape shape) : dtype_(dtype), shape_(std::move(shape)), bytes_(bytes_of(dtype, shape_)) {
    void* memory = std::aligned_alloc(kAlignment, (bytes_ + kAlignment) / kAlignment * kAlignment);
    if (!memory) throw std::bad_alloc();
    memory_ = std::shared_ptr<void>(memory, std::free);
  }
  Buffer(DType dtype, Shape shape, std::shared_ptr<DeviceMemory> device)
      : dtype_(dtype), shape_(std::move(shape)), bytes_(bytes_of(dtype, shape_)), device_(std::move(device)) {}

  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  std::size_t bytes() const { return bytes_; }
  std::size_t count() const { return bytes_ / item_size(dtype_); }
  void* data() const { return device_ ? device_->host() : memory_.get(); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data());
  }
  bool on_device() const { return device_ != nullptr; }
  void* address() const { return device_ ? device_->address() : memory_.get(); }  // for the engine
  void upload() const {
    if (device_) device_->upload();
  }
  void download() const {
    if (device_) device_->download();
  }
  void fill(float value) const {
    float* values = as<float>();
    for (std::size_t i = 0; i < count(); ++i) values[i] = value;
    upload();
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  DType dtype_ = DType::f32;
  Shape shape_;
  std::size_t bytes_ = 0;
  std::shared_ptr<void> memory_;
  std::shared_ptr<DeviceMemory> device_;
};

}  // namespace tmd::internal
