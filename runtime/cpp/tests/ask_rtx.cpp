// Asks the real TensorRT for RTX of a plan through our code; no GPU is needed to ask, only to get a yes.
//
//     tmd_ask_rtx LIBRARY PLAN        prints the library's version, and "taken" or what our error says
#include <cstdio>

#include "engines/mapped_file.hpp"
#include "engines/tensorrt_plan.hpp"

using namespace tmd::internal;

int main(int count, char** words) {
  if (count != 3) return 2;
  try {
    const auto library = tensorrt_rtx::TensorRt::open(words[1]);
    std::puts(library->version.c_str());
    const std::string path = words[2];
    const std::size_t slash = path.rfind('/');
    const MappedFile plan{open_regular(path.substr(0, slash), path.substr(slash + 1))};
    tensorrt_rtx::LoadedPlan loaded(library, plan.bytes());
    std::puts("taken");
  } catch (const Error& error) {
    std::puts(error.what());
  }
  return 0;
}
