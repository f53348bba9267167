// A prompt against the words that a model knows, for a bundle that lists them (`draws` in its manifest). The twin of
// Python's `text/vocabulary.py`: the same words, the same sentence.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "bundle/sections.hpp"

namespace tmd::internal {

// A sentence that names the words of a UTF-8 `prompt` that the model does not know, and says what it draws; "" if there
// are none, or if the model does not say which it knows.
std::string unknown_words(std::string_view prompt, const std::optional<DrawsInfo>& draws);

}  // namespace tmd::internal
