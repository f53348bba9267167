// ONNX Runtime's C interface, found at run time: this library links and starts without ONNX Runtime.
#pragma once

#include <onnxruntime_c_api.h>

#include <memory>
#include <string>

namespace tmd::internal {

// The library, loaded and started; shared by everything that was opened with it.
struct OnnxRuntime {
  const OrtApi* api = nullptr;
  std::string version;
  OrtEnv* environment = nullptr;

  // `path` empty: beside this library, then the system's loader, then where it was at build time.
  // Throws Error(ENGINE) that says where it looked, or that it is too old.
  static std::shared_ptr<OnnxRuntime> open(const std::string& path);
  OnnxRuntime() = default;
  OnnxRuntime(const OnnxRuntime&) = delete;
  OnnxRuntime& operator=(const OnnxRuntime&) = delete;
  ~OnnxRuntime();

  // Throws Error(ENGINE) with ONNX Runtime's reason, "ONNX Runtime `what`: ...", unless `status` is NULL; frees it.
  void check(OrtStatus* status, const std::string& what) const;
};

}  // namespace tmd::internal
