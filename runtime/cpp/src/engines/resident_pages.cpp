#include "engines/resident_pages.hpp"

#include <chrono>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <system_error>

#include <sys/mman.h>

namespace tmd::internal {
namespace {

constexpr std::chrono::milliseconds kPeriod{20};  // an engine packs some 10 MB meanwhile

// The kernel escapes nothing but newlines in a name.
std::string in_maps(const std::string& path) {
  std::string name;
  for (const char c : path) c == '\n' ? name += "\\012" : name += c;
  return name;
}

void drop(const PageRanges& ranges) {
#ifdef __linux__
  for (const auto& [address, length] : ranges) ::madvise(address, length, MADV_DONTNEED);
#else
  (void)ranges;
#endif
}

}  // namespace

PageRanges mapped_ranges(const std::string& path) {
  PageRanges found;
#ifdef __linux__
  const std::string name = in_maps(path), gone = name + " (deleted)";
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    std::uintptr_t start = 0, end = 0;
    char dash = 0;
    std::string rights, offset, device, inode, file;
    if (!(fields >> std::hex >> start >> dash >> end >> rights >> offset >> device >> inode)) continue;
    std::getline(fields >> std::ws, file);
    if ((file == name || file == gone) && rights.find('w') == std::string::npos)
      found.emplace_back(reinterpret_cast<void*>(start), end - start);
  }
#else
  (void)path;
#endif
  return found;
}

DroppingPages::DroppingPages(PageRanges ranges) : ranges_(std::move(ranges)) {
  if (ranges_.empty()) return;
  try {
    watcher_ = std::thread([this] { watch(); });
  } catch (const std::system_error&) {  // no more threads to be had: the pages go when this does
  }
}

DroppingPages::~DroppingPages() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    over_ = true;
  }
  changed_.notify_all();
  if (watcher_.joinable()) watcher_.join();
  drop(ranges_);
}

void DroppingPages::watch() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!changed_.wait_for(lock, kPeriod, [this] { return over_; })) drop(ranges_);
}

}  // namespace tmd::internal
