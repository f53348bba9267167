// Memory that an engine reads and writes in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "bundle/sections.hpp"

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

template <typename T>
constexpr DType dtype_for();
template <>
constexpr DType dtype_for<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_for<std::int64_t>() {
  return DType::i64;
}
template <>
constexpr DType dtype_for<std::uint8_t>() {
  return DType::u8;
}

// Memory of a device, and a copy of it that the host sees. Throws Error(ENGINE).
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual void* address() const = 0;                // on the device
  virtual void* host() = 0;                         // the copy; made when it is first asked for
  virtual void upload() = 0;                        // the copy goes to the device
  virtual void download() = 0;                      // and back
  virtual void copy(const DeviceMemory& from) = 0;  // of another memory of this device and size; may be recorded
};

// A tensor that owns its memory, or shares it with a copy of itself. Aligned for vector instructions, not initialised.
// An engine of a device has it there: then what the host writes counts after `upload`, and what a graph has written is
// seen after `download`. In the host's own memory these do nothing.
//
// Whoever reads or writes says how many values of which type there must be: a buffer of another size or type is an
// Error(RUN), whatever the manifest said of it.
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
  bool on_device() const { return device_ != nullptr; }
  void* address() const { return device_ ? device_->address() : memory_.get(); }  // for the engine
  void upload() const {
    if (device_) device_->upload();
  }
  void download() const {
    if (device_) device_->download();
  }

  // The `count` values, where the host sees them.
  template <typename T>
  T* values(std::size_t count) const {
    if (dtype_ != dtype_for<T>() || count != this->count()) refuse(count, dtype_name(dtype_for<T>()));
    return static_cast<T*>(device_ ? device_->host() : memory_.get());
  }
  template <typename T>
  void write(const T* from, std::size_t count, std::size_t rows = 1) const {  // the same in each of the rows
    T* to = values<T>(rows * count);
    for (std::size_t row = 0; row < rows; ++row) std::memcpy(to + row * count, from, count * sizeof(T));
    upload();
  }
  template <typename T>
  std::vector<T> read(std::size_t count) const {
    const T* from = values<T>(count);
    download();
    return std::vector<T>(from, from + count);
  }
  void fill(float value) const {
    float* to = values<float>(count());
    for (std::size_t i = 0; i < count(); ++i) to[i] = value;
    upload();
  }

  // From a buffer of the same engine, type and size, on the device where there is one.
  void copy(const Buffer& from) const {
    if (from.dtype_ != dtype_ || from.bytes_ != bytes_ || from.on_device() != on_device())
      refuse(from.count(), dtype_name(from.dtype_));
    if (device_) {
      device_->copy(*from.device_);
    } else {
      std::memcpy(memory_.get(), from.memory_.get(), bytes_);
    }
  }

 private:
  static constexpr std::size_t kAlignment = 64;

  [[noreturn]] void refuse(std::size_t count, const char* type) const {
    fail_run("a tensor of this bundle has " + std::to_string(this->count()) + " values of " + dtype_name(dtype_) +
             ", and the run has " + std::to_string(count) + " of " + type + " for it. Export the bundle again.");
  }

  DType dtype_ = DType::f32;
  Shape shape_;
  std::size_t bytes_ = 0;
  std::shared_ptr<void> memory_;
  std::shared_ptr<DeviceMemory> device_;
};

}  // namespace tmd::internal
