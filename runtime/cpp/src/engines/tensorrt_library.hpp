// One of NVIDIA's two libraries, TensorRT or TensorRT for RTX, found at run time: this library links and starts without
// both. NVIDIA's own headers declare the functions, so that a changed signature is an error of the compiler.
//
// The sources named tensorrt_*.cpp are compiled once for each of the two, with its headers: TMD_TRT is the namespace of
// what comes of it, and the headers' own namespace has another name for each, because the classes of the two have the
// same names and other tables of functions. What differs between them in our code is in tensorrt_server.cpp and
// tensorrt_rtx.cpp, by the declarations of tensorrt_variant.hpp.
//
// Compiled against headers of TensorRT 10.3, 10.16, 11.0 and 11.1, and of TensorRT for RTX 1.5 and 1.6; never run on a
// GPU.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>

namespace tmd::internal::TMD_TRT {

#define TMD_TENSORRT_FUNCTIONS(X) \
  X(createInferRuntime_INTERNAL)  \
  X(getInferLibMajorVersion)      \
  X(getInferLibMinorVersion)      \
  X(getInferLibPatchVersion)      \
  X(getInferLibBuildVersion)

// The library, loaded; it needs no GPU yet.
struct TensorRt {
#define TMD_MEMBER(name) decltype(&::name) name = nullptr;
  TMD_TENSORRT_FUNCTIONS(TMD_MEMBER)
#undef TMD_MEMBER

  std::string version;  // "10.16.1.11"

  // `path` is the library's; empty: beside this library, then the system's loader. Throws Error(ENGINE) that says what
  // is missing, or that it is of another version than the headers.
  static std::shared_ptr<TensorRt> open(const std::string& path);
};

}  // namespace tmd::internal::TMD_TRT
