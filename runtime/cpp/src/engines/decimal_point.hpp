// A decimal point for engines that read numbers as the host's language writes them; the twin of
// tmd_engines.device.numbers.
//
// OpenVINO reads attributes from text while it compiles, with the C library's functions: under a decimal comma 0.5
// becomes 0, and frames differ by a level without a word.
#pragma once

#include <locale.h>

namespace tmd::internal {

// For its lifetime this thread reads and writes numbers with a point; the host's other threads keep their locale.
class DecimalPoint {
 public:
  DecimalPoint();
  DecimalPoint(const DecimalPoint&) = delete;
  ~DecimalPoint();

 private:
  locale_t plain_, before_;
};

}  // namespace tmd::internal
