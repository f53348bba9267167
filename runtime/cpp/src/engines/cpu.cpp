#include "engines/cpu.hpp"

#include <fstream>
#include <sstream>

namespace tmd::internal {

bool fast_unsigned_products(const std::string& root) {
  std::ifstream file(root + "/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 5, "flags") != 0) continue;
    std::istringstream words(line);
    for (std::string word; words >> word;)
      if (word == "avx512_vnni" || word == "avx_vnni" || word == "amx_int8") return true;
    return false;  // every core's line is the same
  }
  return false;
}

}  // namespace tmd::internal
