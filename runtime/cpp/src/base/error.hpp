// The one exception inside the library. It never leaves: the C border (api.cpp) turns it into a status and a text.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "tmd/tmd.h"

namespace tmd::internal {

class Error : public std::exception {
 public:
  Error(tmd_status status, std::string text) : status_(status), text_(std::move(text)) {}
  tmd_status status() const noexcept { return status_; }
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  tmd_status status_;
  std::string text_;
};

[[noreturn]] inline void refuse_bundle(const std::string& text) { throw Error(TMD_ERROR_BUNDLE, text); }
[[noreturn]] inline void refuse_usage(const std::string& text) { throw Error(TMD_ERROR_USAGE, text); }
[[noreturn]] inline void fail_engine(const std::string& text) { throw Error(TMD_ERROR_ENGINE, text); }
[[noreturn]] inline void fail_run(const std::string& text) { throw Error(TMD_ERROR_RUN, text); }

}  // namespace tmd::internal
