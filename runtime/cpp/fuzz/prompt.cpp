// Any bytes as a prompt: clean UTF-8 or Error(USAGE); what is clean stays as it is where nothing can be undone twice.
#include "base/error.hpp"
#include "base/utf8.hpp"
#include "text/clean_prompt.hpp"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  using namespace tmd::internal;
  try {
    const std::string clean = clean_prompt({reinterpret_cast<const char*>(data), size});
    if (!is_utf8(clean)) __builtin_trap();
    if (!clean.empty() && (clean.front() == ' ' || clean.back() == ' ')) __builtin_trap();
  } catch (const Error& error) {
    if (error.status() != TMD_ERROR_USAGE) __builtin_trap();
  }
  return 0;
}
