#include "engines/engine_library.hpp"

#include <dlfcn.h>

#include "base/error.hpp"

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

std::vector<std::string> places(const LibraryNames& names) {
  std::vector<std::string> list;
  const std::string own = own_folder();
  if (!own.empty() && !names.names.empty()) list.push_back(own + names.names.front());
  list.insert(list.end(), names.names.begin(), names.names.end());
  if (!names.built_with.empty()) list.push_back(names.built_with);
  return list;
}

}  // namespace

void* open_engine_library(const LibraryNames& names, const std::string& path) {
  const std::vector<std::string> tried = path.empty() ? places(names) : std::vector<std::string>{path};
  std::string reasons;
  for (const std::string& place : tried) {
    if (void* handle = ::dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
    const char* reason = ::dlerror();
    reasons += std::string(reasons.empty() ? "" : "; ") + (reason ? reason : place);
  }
  fail_engine(std::string(names.engine) + " cannot be loaded (" + reasons.substr(0, 600) +
              "). Install it, put its libraries beside this one, or name " + names.names.back() +
              " in engine_library.");
}

void* find_symbol(void* handle, const char* engine, const char* name) {
  void* found = ::dlsym(handle, name);
  if (!found) fail_engine(std::string("this ") + engine + " has no function " + name + ": install another version.");
  return found;
}

}  // namespace tmd::internal
