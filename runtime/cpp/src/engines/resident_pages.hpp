// Pages of a mapped file that this process holds and need not. The twin of tmd_engines/device/resident_pages.py.
//
// An engine that maps the weights of a graph, and packs them into memory of its own, leaves every page that it has read
// resident: at its peak the weights are there twice. The pages that are taken from the process stay in the kernel's
// cache of files, so reading one again costs a page fault and not the disk.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace tmd::internal {

// Addresses and lengths in bytes, all multiples of a page.
using PageRanges = std::vector<std::pair<void*, std::size_t>>;

// Where this process has mapped the file that it opened as `path`, for reading alone; nothing but on Linux. The name may
// be gone by now. It has to be one that nobody else in this process opens: what is found belongs to the caller's
// mapping, and is good for as long as that is.
PageRanges mapped_ranges(const std::string& path);

// For as long as it lives, takes the pages of `ranges` from this process every 20 ms, and once more when it goes.
// Whoever reads them again gets the same bytes. The mapping has to outlive it.
class DroppingPages {
 public:
  explicit DroppingPages(PageRanges ranges);
  DroppingPages(const DroppingPages&) = delete;
  DroppingPages& operator=(const DroppingPages&) = delete;
  ~DroppingPages();

 private:
  void watch();

  PageRanges ranges_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;
  std::thread watcher_;
};

}  // namespace tmd::internal
