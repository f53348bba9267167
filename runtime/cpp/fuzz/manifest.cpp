// Any bytes as manifest.json: a manifest or Error(BUNDLE), nothing else.
#include "base/error.hpp"
#include "bundle/manifest.hpp"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  try {
    tmd::internal::parse_manifest({reinterpret_cast<const char*>(data), size}, "manifest.json");
  } catch (const tmd::internal::Error& error) {
    if (error.status() != TMD_ERROR_BUNDLE) __builtin_trap();
  }
  return 0;
}
