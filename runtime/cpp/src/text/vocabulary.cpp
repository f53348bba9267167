#include "text/vocabulary.hpp"

#include <algorithm>
#include <vector>

#include "base/ascii.hpp"
#include "base/utf8.hpp"
#include "text/unicode.hpp"

namespace tmd::internal {
namespace {

constexpr std::size_t kShown = 5, kLongest = 40;

// \w+(?:'\w+)*, with A to Z in lower case: all that a word of a model has.
std::vector<std::u32string> words_of(std::u32string_view text) {
  std::vector<std::u32string> words;
  std::u32string word;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char32_t c = text[i];
    const bool joins = c == U'\'' && !word.empty() && i + 1 < text.size() && is_word(text[i + 1]);
    if (is_word(c) || joins) {
      word += is_ascii_upper(c) ? c - U'A' + U'a' : c;
    } else if (!word.empty()) {
      words.push_back(std::move(word));
      word.clear();
    }
  }
  if (!word.empty()) words.push_back(std::move(word));
  return words;
}

}  // namespace

std::string unknown_words(std::string_view prompt, const std::optional<DrawsInfo>& draws) {
  if (!draws) return "";
  std::vector<std::u32string> unknown;
  for (std::u32string& word : words_of(decode_utf8(prompt))) {
    const bool known = std::binary_search(draws->words.begin(), draws->words.end(), encode_utf8(word));
    if (!known && std::find(unknown.begin(), unknown.end(), word) == unknown.end()) unknown.push_back(std::move(word));
  }
  if (unknown.empty()) return "";
  std::string shown;
  for (std::size_t i = 0; i < std::min(unknown.size(), kShown); ++i) {
    const std::u32string& word = unknown[i];
    shown += (i ? ", \"" : "\"") + encode_utf8(word.substr(0, kLongest)) + (word.size() > kLongest ? "...\"" : "\"");
  }
  if (unknown.size() > kShown) shown += " and " + std::to_string(unknown.size() - kShown) + " more words";
  return "this model does not know " + shown + ": it draws " + draws->description + ". Example: \"" + draws->example +
         "\".";
}

}  // namespace tmd::internal
