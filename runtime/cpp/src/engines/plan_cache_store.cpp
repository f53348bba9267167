// The writing half of the cache: as Python writes it, so that either may write while the other does, or is killed.
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <random>

#include "engines/plan_cache.hpp"

namespace tmd::internal {
namespace {

constexpr std::uint64_t kMaxFolder = std::uint64_t{64} << 30;
constexpr const char *kNew = ".new-", *kUnfinished = ".part", *kEntry = ".plan";

bool is_named(const std::string& name, const std::string& begin, const std::string& end) {
  return name.size() > begin.size() + end.size() && name.compare(0, begin.size(), begin) == 0 &&
         name.compare(name.size() - end.size(), end.size(), end) == 0;
}

std::vector<std::string> names_in(const std::string& folder, const std::string& begin, const std::string& end) {
  std::vector<std::string> names;
  const std::unique_ptr<DIR, int (*)(DIR*)> listing(::opendir(folder.c_str()), ::closedir);
  while (const dirent* each = listing ? ::readdir(listing.get()) : nullptr)
    if (is_named(each->d_name, begin, end)) names.emplace_back(each->d_name);
  return names;
}

// Only the last folder is private, as with Python's mkdir.
void make_folders(const std::string& folder) {
  for (std::size_t slash = folder.find('/', 1); slash != std::string::npos; slash = folder.find('/', slash + 1))
    ::mkdir(folder.substr(0, slash).c_str(), 0777);
  ::mkdir(folder.c_str(), 0700);
}

bool is_same_file(const std::string& path, int descriptor) {
  struct stat named, opened;
  return ::lstat(path.c_str(), &named) == 0 && ::fstat(descriptor, &opened) == 0 && named.st_dev == opened.st_dev &&
         named.st_ino == opened.st_ino;
}

// Removes what processes that are gone have left: a lock ends with its process.
void sweep(const std::string& folder) {
  for (const std::string& name : names_in(folder, kNew, kUnfinished)) {
    const std::string path = folder + "/" + name;
    const File file(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    if (file.descriptor() >= 0 && ::flock(file.descriptor(), LOCK_EX | LOCK_NB) == 0 &&
        is_same_file(path, file.descriptor()))
      ::unlink(path.c_str());
  }
}

// Removes the oldest entries until those that stay have no more bytes than `limit`.
void make_room(const std::string& folder, std::uint64_t limit) {
  struct Known {
    timespec changed;
    std::uint64_t size;
    std::string path;
  };
  std::vector<Known> entries;
  std::uint64_t all = 0;
  for (const std::string& name : names_in(folder, "", kEntry)) {
    struct stat status;
    const std::string path = folder + "/" + name;
    if (::lstat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) continue;
    entries.push_back({status.st_mtim, static_cast<std::uint64_t>(status.st_size), path});
    all += entries.back().size;
  }
  std::sort(entries.begin(), entries.end(), [](const Known& a, const Known& b) {
    return a.changed.tv_sec != b.changed.tv_sec ? a.changed.tv_sec < b.changed.tv_sec
                                                : a.changed.tv_nsec < b.changed.tv_nsec;
  });
  for (const Known& entry : entries) {
    if (all <= limit) return;
    if (::unlink(entry.path.c_str()) == 0) all -= entry.size;
  }
}

bool write_all(int descriptor, std::string_view content) {
  while (!content.empty()) {
    const ssize_t count = ::write(descriptor, content.data(), content.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    content.remove_prefix(static_cast<std::size_t>(count));
  }
  return true;
}

std::string random_name() {
  std::random_device source;
  char hex[17];
  std::snprintf(hex, sizeof hex, "%08x%08x", source(), source());
  return hex;
}

}  // namespace

void store_entry(const std::string& folder, const PlanKey& key, std::string_view content) {
  if (content.size() > kMaxFolder) return;
  make_folders(folder);
  if (!distrust(folder).empty()) return;
  sweep(folder);
  make_room(folder, kMaxFolder - content.size());
  const std::string path = folder + "/" + kNew + random_name() + kUnfinished;
  const File file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (file.descriptor() < 0) return;
  ::flock(file.descriptor(), LOCK_EX | LOCK_NB);  // where the file system has no locks, nobody sweeps either
  const bool written = write_all(file.descriptor(), entry_line(key, content) + "\n") &&
                       write_all(file.descriptor(), content) && ::fchmod(file.descriptor(), 0600) == 0;
  // Whoever swept it before it had its lock has removed the name.
  if (!written || ::rename(path.c_str(), (folder + "/" + plan_file_name(key)).c_str()) != 0) ::unlink(path.c_str());
}

}  // namespace tmd::internal
