#include "bundle/files.hpp"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <memory>
#include <new>
#include <system_error>
#include <vector>

#include "base/error.hpp"
#include "base/stopping.hpp"

namespace tmd::internal {
namespace {

constexpr std::size_t kChunk = std::size_t{1} << 20;

std::string reason(int code) { return std::generic_category().message(code); }

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    if (!context_ || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) throw std::bad_alloc();
  }
  void update(const void* data, std::size_t size) {
    if (EVP_DigestUpdate(context_.get(), data, size) != 1) throw std::bad_alloc();
  }
  std::string hex() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    if (EVP_DigestFinal_ex(context_.get(), digest, &size) != 1) throw std::bad_alloc();
    std::string out;
    for (unsigned int i = 0; i < size; ++i) {
      out += "0123456789abcdef"[digest[i] >> 4];
      out += "0123456789abcdef"[digest[i] & 15];
    }
    return out;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context_;
};

}  // namespace

File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

std::uint64_t File::size() const {
  struct stat status;
  return ::fstat(descriptor_, &status) == 0 ? static_cast<std::uint64_t>(status.st_size) : 0;
}

std::size_t File::read_some(void* to, std::size_t count, const std::string& path) const {
  check_stopped();
  for (;;) {
    const ssize_t got = ::read(descriptor_, to, count);
    if (got >= 0) return static_cast<std::size_t>(got);
    if (errno != EINTR)
      refuse_bundle(path + " cannot be read: " + reason(errno) + ". Check the disk, or copy the bundle again.");
  }
}

std::string File::read_up_to(std::uint64_t limit, const std::string& path) const {
  std::string content;
  while (limit > 0) {
    const std::size_t before = content.size();
    const std::size_t want = static_cast<std::size_t>(std::min<std::uint64_t>(limit, kChunk));
    content.resize(before + want);
    const std::size_t got = read_some(&content[before], want, path);
    content.resize(before + got);
    if (got == 0) break;
    limit -= got;
  }
  return content;
}

std::string File::sha256_hex(const std::string& path) const {
  Sha256 hash;
  std::vector<char> buffer(kChunk);
  while (const std::size_t got = read_some(buffer.data(), buffer.size(), path)) hash.update(buffer.data(), got);
  return hash.hex();
}

std::string sha256_hex(std::string_view content) {
  Sha256 hash;
  hash.update(content.data(), content.size());
  return hash.hex();
}

File open_regular(const std::string& folder, const std::string& name, Links links) {
  const std::string path = folder + "/" + name;
  struct stat status;
  const bool is_link = ::lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode);
  if (is_link && links == Links::refuse)
    refuse_bundle(path + " is a symbolic link, which could lead out of the bundle: put the file itself there.");
  // Asked before opening: a link may lead to a device, which opening may start.
  if (::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode)) {
    // O_NOFOLLOW: a link put there since; O_NONBLOCK: opening a pipe must not wait for a writer.
    const int no_link = is_link ? 0 : O_NOFOLLOW;
    File file(::open(path.c_str(), O_RDONLY | no_link | O_NONBLOCK | O_CLOEXEC));
    if (file.descriptor() >= 0 && ::fstat(file.descriptor(), &status) == 0 && S_ISREG(status.st_mode)) return file;
    if (file.descriptor() >= 0) errno = 0;
  } else if (::access(path.c_str(), F_OK) == 0) {
    errno = 0;
  }
  const int code = errno;
  if (code == ENOENT && is_link)
    refuse_bundle(path +
                  " is a link to a file that is not there: the bundle is incomplete. Copy or download it again.");
  if (code == ENOENT)
    refuse_bundle(path +
                  " is missing: the bundle is incomplete. Copy the bundle again, or make it again with tmd-export.");
  if (code != 0) refuse_bundle(path + " cannot be opened: " + reason(code) + ". Check the path and its permissions.");
  refuse_bundle(path + (is_link ? " is a link to something that is not a regular file" : " is not a regular file") +
                ": put the file itself there, or make the bundle again.");
}

std::string format_size(std::uint64_t bytes) {
  if (bytes < 1000) return std::to_string(bytes) + " bytes";
  double size = static_cast<double>(bytes);
  const char* unit = "";
  for (const char* next : {"kB", "MB", "GB"}) {
    if (size < 1000) break;
    size /= 1000;
    unit = next;
  }
  char text[40];  // of the C library's functions the host's language would choose the point
  const auto end = std::to_chars(text, text + sizeof text, size, std::chars_format::fixed, 1).ptr;
  return std::string(text, end) + " " + unit;
}

}  // namespace tmd::internal
