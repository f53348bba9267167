#include "engines/onnxruntime_library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "base/error.hpp"
#include "base/stopping.hpp"
#include "engines/engine_library.hpp"

// Set by CMake if it found a library beside the header.
#ifndef TMD_ONNXRUNTIME_LIBRARY
#define TMD_ONNXRUNTIME_LIBRARY ""
#endif

namespace tmd::internal {
namespace {

// 1.24 is the oldest release that Python's engine takes too. OrtApi grows at its end only, so that an older header
// describes the beginning of a newer table, and a newer header that of this one: nothing is called that came later.
constexpr std::uint32_t kApiVersion = 24;

// "1.31.1" -> 31; 0 if it is no 1.x.
long minor_version(const std::string& version) {
  return version.compare(0, 2, "1.") == 0 ? std::strtol(version.c_str() + 2, nullptr, 10) : 0;
}

// Errors come as statuses; lines on somebody's stderr are not for a library to write.
void ORT_API_CALL drop_line(void*, OrtLoggingLevel, const char*, const char*, const char*, const char*) {}

}  // namespace

std::shared_ptr<OnnxRuntime> OnnxRuntime::open(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, std::weak_ptr<OnnxRuntime>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (std::shared_ptr<OnnxRuntime> found = known[path].lock()) return found;

  auto library = std::make_shared<OnnxRuntime>();
  const LibraryNames names = {"ONNX Runtime", {"libonnxruntime.so.1", "libonnxruntime.so"}, TMD_ONNXRUNTIME_LIBRARY};
  // Version 1.31 keeps a record of its use in the user's cache, to be sent, unless this is set before it is loaded.
  ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);
  void* handle = open_engine_library(names, path);
  const auto get_base = reinterpret_cast<decltype(&OrtGetApiBase)>(::dlsym(handle, "OrtGetApiBase"));
  if (!get_base) fail_engine("this ONNX Runtime has no function OrtGetApiBase: name libonnxruntime.so.1.");
  const OrtApiBase* base = get_base();
  library->version = base->GetVersionString();
  // Asked first: GetApi writes to stderr where it has to refuse.
  if (minor_version(library->version) < static_cast<long>(kApiVersion) || !(library->api = base->GetApi(kApiVersion)))
    fail_engine("this ONNX Runtime is " + library->version + ", and 1." + std::to_string(kApiVersion) +
                " or a later 1.x is needed: install a newer one.");
  library->check(library->api->CreateEnvWithCustomLogger(drop_line, nullptr, ORT_LOGGING_LEVEL_FATAL, "tmd",
                                                         &library->environment),
                 "cannot start");
  known[path] = library;
  return library;
}

OnnxRuntime::~OnnxRuntime() {
  if (environment) api->ReleaseEnv(environment);
}

void OnnxRuntime::check(OrtStatus* status, const std::string& what) const {
  if (!status) return;
  const std::unique_ptr<OrtStatus, void (*)(OrtStatus*)> owner(status, api->ReleaseStatus);
  check_stopped();  // a graph that was stopped ends with an error
  std::string reason = api->GetErrorMessage(status);
  for (char& c : reason)
    if (c == '\n' || c == '\r' || c == '\t') c = ' ';
  fail_engine("ONNX Runtime " + what + ": " + reason.substr(0, 500));
}

}  // namespace tmd::internal
