// Any bytes as a sentencepiece model, and a prompt read with it: tokens or an Error.
//
// Sentencepiece's own library is not built with the sanitizers here: what it does wrong shows as a crash only.
#include "base/error.hpp"
#include "text/tokenizer.hpp"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  using namespace tmd::internal;
  TextInfo text;
  text.max_length = 16;
  text.eos_id = 1;
  try {
    const Tokenizer tokenizer({reinterpret_cast<const char*>(data), size}, text, "tokenizer.model");
    const Tokens tokens = tokenizer("a red circle, \xC3\xA9\xE4\xB8\x80 0123");
    if (tokens.ids.size() != 16) __builtin_trap();
  } catch (const Error&) {
  }
  return 0;
}
