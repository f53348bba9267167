#include "engines/private_folder.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

namespace tmd::internal {

PrivateFolder::PrivateFolder(const std::string& parent) {
  const char* temporary = std::getenv("TMPDIR");
  std::string wanted = (!parent.empty() ? parent : temporary && *temporary ? temporary : "/tmp") + "/.tmd-XXXXXX";
  if (::mkdtemp(wanted.data())) folder_ = std::move(wanted);
}

PrivateFolder::~PrivateFolder() {
  if (folder_.empty()) return;
  for (const std::string& name : names_) ::unlink((folder_ + "/" + name).c_str());
  ::rmdir(folder_.c_str());
}

bool PrivateFolder::write(const std::string& name, std::string_view content) {
  if (folder_.empty()) return false;
  names_.push_back(name);
  const int file = ::open(path(name).c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (file < 0) return false;
  while (!content.empty()) {
    const ssize_t count = ::write(file, content.data(), content.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;
    content.remove_prefix(static_cast<std::size_t>(count));
  }
  return ::close(file) == 0 && content.empty();
}

bool PrivateFolder::link(const std::string& source, const std::string& name) {
  if (folder_.empty()) return false;
  names_.push_back(name);
  return ::linkat(AT_FDCWD, source.c_str(), AT_FDCWD, path(name).c_str(), AT_SYMLINK_FOLLOW) == 0;
}

}  // namespace tmd::internal
