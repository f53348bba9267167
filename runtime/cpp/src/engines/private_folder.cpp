#include "engines/private_folder.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>

#include "base/ascii.hpp"

namespace tmd::internal {
namespace {

constexpr std::string_view kPrefix = ".tmd-", kSuffix = ".part";
constexpr int kAttempts = 100;

std::string new_name() {
  static constexpr char digits[] = "0123456789abcdef";
  std::random_device random;
  std::string name(kPrefix);
  for (int k = 0; k < 12; ++k) name += digits[random() % 16];
  return name.append(kSuffix);
}

bool is_name(std::string_view name) {
  if (name.size() <= kPrefix.size() + kSuffix.size()) return false;
  if (name.substr(0, kPrefix.size()) != kPrefix || name.substr(name.size() - kSuffix.size()) != kSuffix) return false;
  for (const char c : name.substr(kPrefix.size(), name.size() - kPrefix.size() - kSuffix.size())) {
    const auto letter = static_cast<unsigned char>(c);
    if (!is_ascii_letter(letter) && !is_ascii_digit(letter) && c != '_' && c != '-') return false;
  }
  return true;
}

// A descriptor that holds the lock of a folder of this user; below 0: it is locked or somebody else's, or there are no
// locks.
int lock_of(const std::string& path) {
  const int lock = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (lock < 0) return lock;
  struct stat status;
  if (::fstat(lock, &status) == 0 && status.st_uid == ::geteuid() && ::flock(lock, LOCK_EX | LOCK_NB) == 0) return lock;
  ::close(lock);
  return -1;
}

// Whether the folder of that descriptor still has this name.
bool is_at(const std::string& path, int lock) {
  struct stat named, held;
  return ::lstat(path.c_str(), &named) == 0 && ::fstat(lock, &held) == 0 && named.st_dev == held.st_dev &&
         named.st_ino == held.st_ino;
}

void remove_folder(const std::string& path, int folder) {
  const int again = ::dup(folder);
  const std::unique_ptr<DIR, int (*)(DIR*)> listing(again < 0 ? nullptr : ::fdopendir(again), ::closedir);
  if (!listing) return;
  while (const dirent* each = ::readdir(listing.get())) ::unlinkat(folder, each->d_name, 0);
  ::rmdir(path.c_str());
}

// Of this process's folder for temporary files, once: what killed processes left there.
std::string parent_folder() {
  const char* named = std::getenv("TMPDIR");
  const std::string parent = named && *named ? named : "/tmp";
  static std::once_flag once;
  std::call_once(once, [&] { sweep_private_folders(parent); });
  return parent;
}

}  // namespace

void sweep_private_folders(const std::string& parent) {
  const std::unique_ptr<DIR, int (*)(DIR*)> listing(::opendir(parent.c_str()), ::closedir);
  if (!listing) return;
  std::vector<std::string> names;
  while (const dirent* each = ::readdir(listing.get()))
    if (is_name(each->d_name)) names.push_back(each->d_name);
  for (const std::string& name : names) {
    const std::string path = parent + "/" + name;
    const int lock = lock_of(path);
    if (lock < 0) continue;
    if (is_at(path, lock)) remove_folder(path, lock);
    ::close(lock);
  }
}

PrivateFolder::PrivateFolder(const std::string& within) {
  const std::string parent = within.empty() ? parent_folder() : within;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    std::string wanted = parent + "/" + new_name();
    if (::mkdir(wanted.c_str(), 0700) != 0) {
      if (errno == EEXIST) continue;
      return;
    }
    lock_ = lock_of(wanted);
    if (lock_ >= 0 && !is_at(wanted, lock_)) {  // somebody removed it before it had its lock
      ::close(lock_);
      lock_ = -1;
      continue;
    }
    folder_ = std::move(wanted);
    return;
  }
}

PrivateFolder::~PrivateFolder() {
  if (folder_.empty()) return;
  for (const std::string& each : paths_) ::unlink(each.c_str());  // no new text: it could throw
  ::rmdir(folder_.c_str());
  if (lock_ >= 0) ::close(lock_);
}

bool PrivateFolder::write(const std::string& name, std::string_view content) {
  if (folder_.empty()) return false;
  paths_.push_back(path(name));
  const int file = ::open(paths_.back().c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
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
  paths_.push_back(path(name));
  return ::linkat(AT_FDCWD, source.c_str(), AT_FDCWD, paths_.back().c_str(), AT_SYMLINK_FOLLOW) == 0;
}

std::string PrivateFolder::real_path(const std::string& name) const {
  const std::unique_ptr<char, decltype(&std::free)> real(::realpath(folder_.c_str(), nullptr), &std::free);
  return real ? std::string(real.get()) + "/" + name : path(name);
}

}  // namespace tmd::internal
