#include "engines/tensorrt_library.hpp"

#include "base/error.hpp"
#include "engines/engine_library.hpp"
#include "engines/tensorrt_variant.hpp"

namespace tmd::internal::TMD_TRT {
namespace {

// Objects are called through tables that only grow within a major version (of TensorRT for RTX from 1.5 on): the
// library may be newer than the headers, and not older.
void check_version(const TensorRt& library) {
  const int major = library.getInferLibMajorVersion(), minor = library.getInferLibMinorVersion();
  if (major == NV_TENSORRT_MAJOR && minor >= NV_TENSORRT_MINOR) return;
  const std::string title = kTitle;
  fail_engine("this library was built with the headers of " + title + " " + std::to_string(NV_TENSORRT_MAJOR) + "." +
              std::to_string(NV_TENSORRT_MINOR) + ", and " + title + " " + library.version +
              " is installed: install that or a later " + std::to_string(NV_TENSORRT_MAJOR) +
              ".x, or build with other headers.");
}

}  // namespace

std::shared_ptr<TensorRt> TensorRt::open(const std::string& path) {
  auto library = std::make_shared<TensorRt>();
  void* handle = open_engine_library(library_names(), path);
#define TMD_FIND(name) library->name = reinterpret_cast<decltype(library->name)>(find_symbol(handle, kTitle, #name));
  TMD_TENSORRT_FUNCTIONS(TMD_FIND)
#undef TMD_FIND
  library->version = std::to_string(library->getInferLibMajorVersion()) + "." +
                     std::to_string(library->getInferLibMinorVersion()) + "." +
                     std::to_string(library->getInferLibPatchVersion()) + "." +
                     std::to_string(library->getInferLibBuildVersion());
  check_version(*library);
  return library;
}

}  // namespace tmd::internal::TMD_TRT
