// A plan made executable on the stream of this process: the twin of tmd_engines.tensorrt.run.
//
// Plans bring code to the GPU. They come from this user's own cache or from a folder that the application named, and
// even these may not bring code for the host.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "engines/tensorrt_library.hpp"
#include "engines/tensorrt_variant.hpp"

namespace tmd::internal::TMD_TRT {

// Keeps the latest errors of the library, to say them in ours.
class Log : public nvinfer1::ILogger {
 public:
  void log(Severity severity, nvinfer1::AsciiChar const* text) noexcept override;
  std::string take();  // "it gave no reason" if there is none

 private:
  std::mutex mutex_;
  std::vector<std::string> errors_;
};

// A plan's weights and code on the GPU; a `Plan` of it runs one size. Throws Error(ENGINE) if it is not taken.
class LoadedPlan {
 public:
  LoadedPlan(std::shared_ptr<TensorRt> library, std::string_view content);

  nvinfer1::ICudaEngine& engine() { return *engine_; }
  [[noreturn]] void fail(const std::string& what);  // with what the library said of it

 private:
  // In this order: each goes before what made it.
  std::shared_ptr<TensorRt> library_;
  Log log_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
};

// A loaded plan for inputs of these shapes, with its share of the scratch memory; of that it asks for `reserve` bytes
// if it needs fewer. `kernels` are what an earlier process compiled for it. Throws Error(ENGINE). Its methods are for
// whoever holds the mutex of `Cuda`.
class Plan {
 public:
  Plan(std::shared_ptr<LoadedPlan> loaded, std::shared_ptr<Cuda> cuda, const Shapes& shapes, std::string_view kernels,
       std::uint64_t reserve);
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan();

  // Throws Error(ENGINE) unless the plan has this tensor, and in the type and shape of the buffer.
  void check_tensor(const std::string& name, const Buffer& buffer, nvinfer1::TensorIOMode mode) const;

  // Runs on these buffers. Returns when the outputs are written; while the stream records, at once. After the first run
  // `keep` gets what was compiled meanwhile, if there is such a thing.
  void run(const Buffers& buffers, const std::function<void(std::string_view)>& keep);

 private:
  std::shared_ptr<LoadedPlan> loaded_;
  std::shared_ptr<Cuda> cuda_;
  MadeContext made_;
  std::uint64_t moves_ = 0;  // of the scratch memory that the context was told of
  bool has_run_ = false;
  std::string not_recordable_;
};

}  // namespace tmd::internal::TMD_TRT
