// Lines for the host's log, if it wants any.
#pragma once

#include <string>

#include "tmd/tmd.h"

namespace tmd::internal {

struct Log {
  tmd_log_fn write = nullptr;
  void* user = nullptr;
  tmd_log_level level = TMD_LOG_ERROR;

  void operator()(tmd_log_level of, const std::string& line) const {
    if (write && of <= level) write(user, of, line.c_str());
  }
};

}  // namespace tmd::internal
