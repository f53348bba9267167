// HTML references in text: undone as Python's html.unescape does it, and as ftfy does it (only the unambiguous ones).
#pragma once

#include <string>
#include <string_view>

namespace tmd::internal {

// Every reference, also without its semicolon: "&amp" and "&notit" as a browser reads them.
std::u32string html_unescape(std::u32string_view text);

// Only references that end in a semicolon, and some names in capitals that HTML does not know ("&NTILDE;").
std::u32string unescape_clear_references(std::u32string_view text);

}  // namespace tmd::internal
