// The content of a file without reading it into memory: a plan of a large model has gigabytes.
#pragma once

#include <memory>
#include <string_view>

#include "bundle/files.hpp"

namespace tmd::internal {

// Pages of a file, read only, for as long as a copy of this is kept; the file itself may be closed meanwhile.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(const File& file);  // throws Error(ENGINE)

  std::string_view bytes() const { return bytes_; }
  MappedFile from(std::size_t offset) const;  // without its beginning

 private:
  std::shared_ptr<void> pages_;
  std::string_view bytes_;
};

}  // namespace tmd::internal
