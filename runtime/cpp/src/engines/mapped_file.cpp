#include "engines/mapped_file.hpp"

#include <sys/mman.h>

#include <cerrno>
#include <system_error>

#include "base/error.hpp"

namespace tmd::internal {

MappedFile::MappedFile(const File& file) {
  const auto size = static_cast<std::size_t>(file.size());
  if (size == 0) return;
  void* pages = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.descriptor(), 0);
  if (pages == MAP_FAILED)
    fail_engine("a file of " + std::to_string(size) + " bytes cannot be read (" +
                std::generic_category().message(errno) + "): is there address space left?");
  pages_.reset(pages, [size](void* mapped) { ::munmap(mapped, size); });
  bytes_ = {static_cast<const char*>(pages), size};
}

MappedFile MappedFile::from(std::size_t offset) const {
  MappedFile rest = *this;
  rest.bytes_.remove_prefix(offset);
  return rest;
}

}  // namespace tmd::internal
