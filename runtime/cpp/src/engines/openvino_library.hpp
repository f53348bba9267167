// OpenVINO's C interface, found at run time: this library links and starts without OpenVINO.
//
// OpenVINO's own headers declare the functions, so that a changed signature is an error of the compiler.
#pragma once

#include <openvino/c/openvino.h>

#include <memory>
#include <string>

namespace tmd::internal {

// Every function that is used; X(name) per line.
#define TMD_OPENVINO_FUNCTIONS(X)           \
  X(ov_get_openvino_version)                \
  X(ov_version_free)                        \
  X(ov_get_error_info)                      \
  X(ov_get_last_err_msg)                    \
  X(ov_free)                                \
  X(ov_core_create)                         \
  X(ov_core_free)                           \
  X(ov_core_read_model)                     \
  X(ov_core_compile_model)                  \
  X(ov_model_reshape)                       \
  X(ov_model_free)                          \
  X(ov_partial_shape_create)                \
  X(ov_partial_shape_free)                  \
  X(ov_compiled_model_create_infer_request) \
  X(ov_compiled_model_free)                 \
  X(ov_infer_request_set_tensor)            \
  X(ov_infer_request_start_async)           \
  X(ov_infer_request_wait)                  \
  X(ov_infer_request_cancel)                \
  X(ov_infer_request_free)                  \
  X(ov_shape_create)                        \
  X(ov_shape_free)                          \
  X(ov_tensor_create_from_host_ptr)         \
  X(ov_tensor_free)

// The library, loaded and with one core; shared by everything that was opened with it.
struct OpenVino {
#define TMD_MEMBER(name) decltype(&::name) name = nullptr;
  TMD_OPENVINO_FUNCTIONS(TMD_MEMBER)
#undef TMD_MEMBER

  std::string version;
  ov_core_t* core = nullptr;

  // `path` empty: beside this library, then the system's loader, then where it was at build time.
  // Throws Error(ENGINE) that says where it looked.
  static std::shared_ptr<OpenVino> open(const std::string& path);
  OpenVino() = default;
  OpenVino(const OpenVino&) = delete;
  OpenVino& operator=(const OpenVino&) = delete;
  ~OpenVino();

  // Throws Error(ENGINE) with OpenVINO's reason, "OpenVINO `what`: ...", unless `status` is good.
  void check(ov_status_e status, const std::string& what) const;
};

}  // namespace tmd::internal
