// Reading the files of an untrusted folder: one open per file, and everything asked of that one descriptor.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace tmd::internal {

// A file open for reading. Made by `open_regular` only.
class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  File(File&& other) noexcept : descriptor_(other.descriptor_) { other.descriptor_ = -1; }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  File& operator=(File&&) = delete;
  ~File();

  std::uint64_t size() const;
  // The bytes from the current position on, `limit` at most, whatever size the file claims. Throws Error(BUNDLE).
  std::string read_up_to(std::uint64_t limit, const std::string& path) const;
  // sha256 of the content from the current position on, lower-case hex. Throws Error(BUNDLE).
  std::string sha256_hex(const std::string& path) const;
  int descriptor() const { return descriptor_; }

 private:
  std::size_t read_some(void* to, std::size_t count, const std::string& path) const;
  int descriptor_;
};

// Whether a file may be a link: yes where its content is compared with a sha256, or checked as a whole.
enum class Links { refuse, follow };

// Opens `folder`/`name` if it is a regular file; hard links are always allowed. Throws Error(BUNDLE).
File open_regular(const std::string& folder, const std::string& name, Links links = Links::refuse);

std::string sha256_hex(std::string_view content);

// Bytes for people, decimal units: "22.1 MB".
std::string format_size(std::uint64_t bytes);

}  // namespace tmd::internal
