// The check of a sentencepiece model's character map, before the library sees it.
//
// The map is a double-array trie and the texts that its leaves point to, stored as the library keeps them in memory.
// Versions before 0.2.3 believe every offset in it and read wherever it points.
#pragma once

#include <string_view>

namespace tmd::internal {

// Whether a serialised sentencepiece model has only maps whose every offset stays inside. False too for bytes that are
// no message of protobuf, and for encodings that protobuf does not write.
bool has_sound_charsmaps(std::string_view model);

}  // namespace tmd::internal
