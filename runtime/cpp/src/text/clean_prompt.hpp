// Wan's prompt cleaning, as Python's runtime does it with ftfy: the text that the tokenizer sees.
#pragma once

#include <string>
#include <string_view>

namespace tmd::internal {

// Undoes HTML escapes, straightens quotes, ligatures and wide letters, drops control characters, composes accents (NFC)
// and collapses white space. Case and punctuation stay.
//
// Where Python's runtime would repair wrongly decoded text ("Ã©" for "é"), this throws Error(USAGE): see mojibake.hpp.
// Also where `check_prompt` does.
std::string clean_prompt(std::string_view prompt);

// Throws Error(USAGE) for what is no UTF-8, and above a million bytes.
void check_prompt(std::string_view prompt);

}  // namespace tmd::internal
