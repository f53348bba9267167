// What stands behind a tmd_context, and the border that every C function passes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/stopping.hpp"
#include "run/pipeline.hpp"
#include "tmd/tmd.h"

struct tmd_context {
  std::atomic<bool> busy{false};
  char error[2048] = "";  // a fixed place: an error must be told when memory is short
  std::string warnings;
  tmd::internal::Stopping stopping;
  tmd::internal::Log log;
  std::unique_ptr<tmd::internal::Pipeline> pipeline;
  // Behind the pointers of a description.
  std::string source, engine_version;
  std::vector<std::int32_t> allowed_steps, allowed_inner_steps;
  // Behind the pointer of the latest result.
  std::vector<double> times;
};

namespace tmd::internal {

inline void set_error(tmd_context* context, const char* text) noexcept {
  std::strncpy(context->error, text, sizeof context->error - 1);
  context->error[sizeof context->error - 1] = '\0';
}

// Behind the error of what needed memory: that the address space is limited, if it is. Takes no memory.
void add_address_space(tmd_context* context) noexcept;

// Runs `work` for a context that nobody else uses, and turns whatever it throws into a status.
template <typename Work>
tmd_status guarded(tmd_context* context, const Work& work) noexcept {
  if (!context) return TMD_ERROR_USAGE;
  if (context->busy.exchange(true, std::memory_order_acquire)) return TMD_ERROR_BUSY;
  tmd_status status = TMD_ERROR_INTERNAL;
  try {
    work();
    status = TMD_OK;
  } catch (const Error& error) {
    status = error.status();
    set_error(context, error.what());
  } catch (const std::bad_alloc&) {
    status = TMD_ERROR_MEMORY;
    set_error(context,
              "there is not enough memory. Choose fewer frames or a smaller size, or open with TMD_MEMORY_LOW.");
  } catch (const std::exception& error) {
    set_error(context, error.what());
  } catch (...) {
    set_error(context, "something was thrown that is no exception of ours: a callback must not throw.");
  }
  if (status == TMD_ERROR_ENGINE || status == TMD_ERROR_MEMORY) add_address_space(context);
  if (status != TMD_OK && status != TMD_CANCELLED && context->log.write) {
    try {
      context->log(TMD_LOG_ERROR, context->error);
    } catch (...) {  // the host's own function; its trouble must not pass through C
    }
  }
  context->busy.store(false, std::memory_order_release);
  return status;
}

// As `guarded`, of work that tmd_cancel can stop.
template <typename Work>
tmd_status stoppable(tmd_context* context, const Work& work) noexcept {
  return guarded(context, [&] {
    const StoppableCall call(context->stopping);
    work();
  });
}

inline Pipeline& opened(tmd_context* context) {
  if (!context->pipeline) refuse_usage("no bundle is open in this context: call tmd_open first.");
  return *context->pipeline;
}

// Structs of callers that may be older or newer than this library: struct_size bytes are theirs.
template <typename T>
T read_options(const T* given, void (*init)(T*), const char* init_name) {
  T options;
  init(&options);
  if (!given) return options;
  if (given->struct_size < 2 * sizeof(std::size_t))
    refuse_usage(std::string("an options struct was not prepared: call ") + init_name + " first.");
  std::memcpy(&options, given, std::min(given->struct_size, sizeof options));
  options.struct_size = sizeof options;
  return options;
}

template <typename T>
void check_struct(const T* out, const char* init_name) {
  if (out && out->struct_size < 2 * sizeof(std::size_t))
    refuse_usage(std::string("a result struct was not prepared: call ") + init_name + " first.");
}

template <typename T>
void write_struct(T* out, const T& value) {
  const std::size_t size = out->struct_size;
  std::memcpy(out, &value, std::min(size, sizeof value));
  out->struct_size = size;
}

}  // namespace tmd::internal
