// Finding an engine's shared library at run time: this library links and starts without any engine.
#pragma once

#include <string>
#include <vector>

namespace tmd::internal {

struct LibraryNames {
  const char* engine;              // for messages: "OpenVINO"
  std::vector<std::string> names;  // file names, best first
  std::string built_with;          // where it was at build time, a path; may be empty
};

// The library at `path`; or, if that is empty, the first one found beside this library, by the system's loader, or
// where it was at build time. Never closed again: engines' threads do not survive that. Throws Error(ENGINE) that says
// where it looked.
void* open_engine_library(const LibraryNames& names, const std::string& path);

// A function of an open library. Throws Error(ENGINE) if it has none of this name.
void* find_symbol(void* handle, const char* engine, const char* name);

}  // namespace tmd::internal
