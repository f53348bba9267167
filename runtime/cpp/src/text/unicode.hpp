// Questions about characters, with Python's answers.
#pragma once

#include <string>
#include <string_view>

namespace tmd::internal {

bool is_space(char32_t c);    // str.isspace, and \s
bool is_decimal(char32_t c);  // \d
bool is_word(char32_t c);     // \w

std::u32string normalize_nfc(std::u32string_view text);
std::u32string normalize_nfkc(std::u32string_view text);

}  // namespace tmd::internal
