#include "engines/openvino_library.hpp"

#include <dlfcn.h>

#include <map>
#include <mutex>

#include "base/error.hpp"
#include "base/stopping.hpp"
#include "engines/engine_library.hpp"

// Set by CMake from the OpenVINO that the headers are of.
#ifndef TMD_OPENVINO_SONAME
#define TMD_OPENVINO_SONAME "libopenvino_c.so"
#endif
#ifndef TMD_OPENVINO_FOLDER
#define TMD_OPENVINO_FOLDER ""
#endif

namespace tmd::internal {
namespace {

LibraryNames names() {
  const std::string folder = TMD_OPENVINO_FOLDER;
  return {"OpenVINO",
          {TMD_OPENVINO_SONAME, "libopenvino_c.so"},
          folder.empty() ? folder : folder + "/" + TMD_OPENVINO_SONAME};
}

}  // namespace

std::shared_ptr<OpenVino> OpenVino::open(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, std::weak_ptr<OpenVino>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (std::shared_ptr<OpenVino> found = known[path].lock()) return found;

  auto library = std::make_shared<OpenVino>();
  void* handle = open_engine_library(names(), path);
#define TMD_FIND(name)                                                               \
  library->name = reinterpret_cast<decltype(library->name)>(::dlsym(handle, #name)); \
  if (!library->name) fail_engine("this OpenVINO has no function " #name ": install a newer one (2024.0 or later).");
  TMD_OPENVINO_FUNCTIONS(TMD_FIND)
#undef TMD_FIND

  ov_version_t version{};
  if (library->ov_get_openvino_version(&version) == OK) {
    library->version = version.buildNumber ? version.buildNumber : "";
    library->ov_version_free(&version);
  }
  library->check(library->ov_core_create(&library->core), "cannot start");
  known[path] = library;
  return library;
}

OpenVino::~OpenVino() {
  if (core) ov_core_free(core);
}

void OpenVino::check(ov_status_e status, const std::string& what) const {
  if (status == OK) return;
  const char* last = ov_get_last_err_msg();
  std::string reason = last && *last ? last : ov_get_error_info(status);
  if (last) ov_free(last);
  check_stopped();  // a graph that was stopped ends with an error
  for (char& c : reason)
    if (c == '\n' || c == '\r' || c == '\t') c = ' ';
  fail_engine("OpenVINO " + what + ": " + reason.substr(0, 500));
}

}  // namespace tmd::internal
