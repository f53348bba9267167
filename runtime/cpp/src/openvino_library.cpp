#include "openvino_library.hpp"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <vector>

#include "error.hpp"

// Set by CMake from the OpenVINO that the headers are of.
#ifndef TMD_OPENVINO_SONAME
#define TMD_OPENVINO_SONAME "libopenvino_c.so"
#endif
#ifndef TMD_OPENVINO_FOLDER
#define TMD_OPENVINO_FOLDER ""
#endif

namespace tmd::internal {
namespace {

// The folder of the library (or program) that holds this code, with its slash; "" if unknown.
std::string own_folder() {
  Dl_info info;
  if (!::dladdr(reinterpret_cast<const void*>(&own_folder), &info) || !info.dli_fname) return "";
  const std::string path = info.dli_fname;
  const std::size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

std::vector<std::string> places() {
  std::vector<std::string> list;
  const std::string own = own_folder();
  if (!own.empty()) list.push_back(own + TMD_OPENVINO_SONAME);
  list.push_back(TMD_OPENVINO_SONAME);
  list.push_back("libopenvino_c.so");
  if (*TMD_OPENVINO_FOLDER) list.push_back(std::string(TMD_OPENVINO_FOLDER) + "/" + TMD_OPENVINO_SONAME);
  return list;
}

void* load(const std::string& path) {
  const std::vector<std::string> tried = path.empty() ? places() : std::vector<std::string>{path};
  std::string reasons;
  for (const std::string& place : tried) {
    // Never closed again: OpenVINO's threads and plugins do not survive that.
    if (void* handle = ::dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
    const char* reason = ::dlerror();
    reasons += std::string(reasons.empty() ? "" : "; ") + (reason ? reason : place);
  }
  fail_engine("OpenVINO cannot be loaded (" + reasons.substr(0, 600) +
              "). Install it, put its libraries beside this one, or name libopenvino_c.so in engine_library.");
}

}  // namespace

std::shared_ptr<OpenVino> OpenVino::open(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, std::weak_ptr<OpenVino>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (std::shared_ptr<OpenVino> found = known[path].lock()) return found;

  auto library = std::make_shared<OpenVino>();
  void* handle = load(path);
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
  for (char& c : reason)
    if (c == '\n' || c == '\r' || c == '\t') c = ' ';
  fail_engine("OpenVINO " + what + ": " + reason.substr(0, 500));
}

}  // namespace tmd::internal
