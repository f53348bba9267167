#include "engines/cpu.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <vector>

#include "base/ascii.hpp"

namespace tmd::internal {
namespace {

constexpr std::uint64_t kSmallBytes = 64u << 20;
constexpr std::int32_t kSmallThreads = 2;

std::string content_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<std::string> words_of(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
  return parts;
}

// The number that is all of `text`; absent for anything else, such as "max" and -1.
std::optional<double> number_of(const std::string& text) {
  if (text.empty()) return std::nullopt;
  double value = 0;
  for (const char c : text) {
    if (!is_ascii_digit(static_cast<unsigned char>(c))) return std::nullopt;
    value = value * 10 + (c - '0');
  }
  return value;
}

std::optional<double> quota_of(const std::string& group) {
  std::vector<std::string> words = words_of(content_of(group + "/cpu.max"));
  if (words.empty())
    for (const char* name : {"quota", "period"})
      for (const std::string& word : words_of(content_of(group + "/cpu.cfs_" + name + "_us"))) words.push_back(word);
  if (words.size() != 2) return std::nullopt;
  const std::optional<double> quota = number_of(words[0]), period = number_of(words[1]);
  if (!quota || !period || *quota == 0 || *period == 0) return std::nullopt;
  return *quota / *period;
}

std::int32_t affinity() {
  for (int most = 1024; most <= 1 << 20; most *= 2) {
    const std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> set(CPU_ALLOC(most), [](cpu_set_t* s) { CPU_FREE(s); });
    const std::size_t size = CPU_ALLOC_SIZE(most);
    if (set && ::sched_getaffinity(0, size, set.get()) == 0) return CPU_COUNT_S(size, set.get());
  }
  return 1;
}

}  // namespace

bool fast_unsigned_products(const std::string& root) {
  std::ifstream file(root + "/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 5, "flags") != 0) continue;
    for (const std::string& word : words_of(line))
      if (word == "avx512_vnni" || word == "avx_vnni" || word == "amx_int8") return true;
    return false;  // every core's line is the same
  }
  return false;
}

std::optional<double> cpu_quota(const std::string& root) {
  std::optional<double> least;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    // number:controllers:path
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::vector<std::string> controllers = split(line.substr(first + 1, second - first - 1), ',');
    std::vector<std::string> mounts = {""};
    if (std::find(controllers.begin(), controllers.end(), "cpu") != controllers.end())
      mounts = {"/cpu", "/cpu,cpuacct"};
    else if (!controllers.empty())
      continue;
    // From the root down to the process's own group. Inside a container the path may be the host's, which is not there;
    // the limit then stands at the mount itself.
    for (const std::string& mount : mounts) {
      std::string group = root + "/sys/fs/cgroup" + mount;
      std::vector<std::string> groups = {group};
      for (const std::string& part : split(line.substr(second + 1), '/'))
        if (!part.empty()) groups.push_back(group += "/" + part);
      for (const std::string& each : groups)
        if (const std::optional<double> quota = quota_of(each)) least = std::min(least.value_or(*quota), *quota);
    }
  }
  return least;
}

std::int32_t usable_cores(const std::string& root) {
  const std::int32_t usable = affinity();
  const std::optional<double> quota = cpu_quota(root);
  if (!quota || *quota >= usable) return usable;
  return std::max(static_cast<std::int32_t>(std::ceil(*quota)), 1);
}

Threads resolve_threads(std::uint64_t bytes, std::int32_t wish, const std::string& root) {
  if (wish < 0) {
    if (bytes <= kSmallBytes) return {kSmallThreads, ""};
    return {cpu_quota(root) ? usable_cores(root) : -1, ""};
  }
  const auto processors = static_cast<std::int32_t>(std::max(::sysconf(_SC_NPROCESSORS_ONLN), 1L));
  const std::int32_t most = std::max(processors, kSmallThreads);
  if (wish <= most) return {wish, ""};
  return {most, std::to_string(wish) + " threads are more than this machine's " + std::to_string(processors) +
                    " processors: " + std::to_string(most) + " are used."};
}

}  // namespace tmd::internal
