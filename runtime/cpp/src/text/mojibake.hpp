// Whether text looks as if it was decoded with the wrong character set ("Ã©" where "é" was meant).
//
// Exactly ftfy's detector (ftfy.badness, version 6.3, https://github.com/rspeer/python-ftfy), which decides when
// Python's runtime repairs a prompt. The repair itself is not here: this library refuses such prompts instead of
// guessing.
#pragma once

#include <string_view>

namespace tmd::internal {

bool looks_wrongly_decoded(std::u32string_view text);

}  // namespace tmd::internal
