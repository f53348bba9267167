#include "engines/plan_cache.hpp"

#include <dirent.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/quote.hpp"

namespace tmd::internal {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMaxLine = std::uint64_t{1} << 16, kMaxEntry = std::uint64_t{32} << 30;
constexpr const char* kEnding = ".plan";

bool ends(const std::string& text, const std::string& with) {
  return text.size() >= with.size() && text.compare(text.size() - with.size(), with.size(), with) == 0;
}

// As Python's json.dumps writes it: ASCII, keys in order, a space after colon and comma.
std::string dump(const json& value) {
  if (!value.is_object()) return value.dump(-1, ' ', true);
  std::string out;
  for (const auto& [name, inner] : value.items())
    out += (out.empty() ? "" : ", ") + json(name).dump(-1, ' ', true) + ": " + dump(inner);
  return "{" + out + "}";
}

// The key in the line that an entry begins with; absent if this is no entry.
std::optional<PlanKey> key_of(const std::string& line) {
  const json document = json::parse(line, nullptr, false);
  if (!document.is_object() || !document.contains("key") || !document["key"].is_object()) return std::nullopt;
  for (const auto& [name, value] : document["key"].items())
    if (!value.is_string()) return std::nullopt;
  return document["key"].get<PlanKey>();
}

struct Entry {
  std::string name;
  PlanKey key;
  timespec changed;
};

std::vector<Entry> entries_of(const std::string& folder) {
  std::vector<Entry> entries;
  const std::unique_ptr<DIR, int (*)(DIR*)> listing(::opendir(folder.c_str()), ::closedir);
  if (!listing) return entries;
  while (const dirent* each = ::readdir(listing.get())) {
    const std::string name = each->d_name;
    if (!ends(name, kEnding)) continue;
    try {
      const File file = open_regular(folder, name);
      const std::string beginning = file.read_up_to(kMaxLine, name);
      std::optional<PlanKey> key = key_of(beginning.substr(0, beginning.find('\n')));
      struct stat status;
      if (key && ::fstat(file.descriptor(), &status) == 0) entries.push_back({name, *std::move(key), status.st_mtim});
    } catch (const Error&) {  // no regular file, or unreadable: no entry
    }
  }
  return entries;
}

// The content of the entry in this file if it is exactly what Python stored there.
MappedFile content_of(const std::string& folder, const std::string& name, const PlanKey& key) {
  if (name != plan_file_name(key)) return {};
  try {
    const MappedFile all{open_regular(folder, name)};
    const std::size_t newline = all.bytes().substr(0, kMaxLine).find('\n');
    if (newline == std::string_view::npos || all.bytes().size() > kMaxEntry + kMaxLine) return {};
    MappedFile content = all.from(newline + 1);
    if (all.bytes().substr(0, newline) == entry_line(key, content.bytes())) return content;
  } catch (const Error&) {
  }
  return {};
}

[[noreturn]] void tell_missing(const std::string& folder, const PlanKey& wanted, const std::vector<Entry>& entries) {
  std::string nearest;
  std::size_t fewest = SIZE_MAX;
  for (const Entry& entry : entries) {
    if (!is_for_graph_and_sizes(entry.key, wanted)) continue;
    const std::vector<std::string> found = differences(entry.key, wanted);
    if (found.empty() || found.size() >= fewest) continue;
    fewest = found.size();
    nearest = " The nearest one is for something else (" + found[0] + (found.size() > 1 ? "; " + found[1] : "") + ").";
  }
  const std::string engine = wanted.at("engine");
  fail_engine("there is no plan of " + quote(wanted.at("title")) + " for " + quote(wanted.at("shapes"), 300) + " in " +
              quote(folder, 300) + "." + nearest + " Build it here, with the same library: tmd-engine build BUNDLE " +
              "--engine " + engine.substr(0, engine.find(' ')) + " --size WIDTHxHEIGHT --frames N.");
}

std::string home_folder() {
  passwd entry, *found = nullptr;
  std::vector<char> space(1 << 16);
  if (::getpwuid_r(::geteuid(), &entry, space.data(), space.size(), &found) != 0 || !found || !found->pw_dir)
    fail_engine("this user has no home folder, where plans would be: name a folder in plan_cache.");
  return found->pw_dir;
}

}  // namespace

std::string entry_line(const PlanKey& key, std::string_view content) {
  return dump({{"key", key}, {"sha256", sha256_hex(content)}, {"size", content.size()}});
}

std::string plan_file_name(const PlanKey& key) { return sha256_hex(dump(key)) + kEnding; }

std::string plan_cache_folder(const std::string& cache) {
  return (cache.empty() ? home_folder() + "/.cache/tmd" : cache) + "/tensorrt";
}

// Who writes an entry decides what this process runs.
std::string distrust(const std::string& folder) {
  struct stat status;
  if (::stat(folder.c_str(), &status) != 0) return "";  // not there: it holds nothing, which is said elsewhere
  if (S_ISDIR(status.st_mode) && status.st_uid == ::geteuid() && (status.st_mode & 022) == 0) return "";
  return "the folder of plans " + quote(folder, 300) +
         " can be written by others than this user, or is no folder: chmod 700 it, or name another one in plan_cache.";
}

FoundPlan find_plan(const std::string& folder, const PlanKey& key) {
  if (const std::string reason = distrust(folder); !reason.empty()) fail_engine(reason);
  std::vector<Entry> entries = entries_of(folder);
  std::sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
    const auto rank = [&](const Entry& each) {
      return std::make_tuple(value_of(each.key, "shapes") == key.at("shapes"), each.changed.tv_sec,
                             each.changed.tv_nsec);
    };
    return rank(a) > rank(b);
  });
  for (const Entry& entry : entries) {
    if (!differences(entry.key, key).empty()) continue;
    const MappedFile content = content_of(folder, entry.name, entry.key);
    if (content.bytes().data()) return {entry.key, content};
  }
  tell_missing(folder, key, entries);
}

MappedFile load_entry(const std::string& folder, const PlanKey& key) {
  return distrust(folder).empty() ? content_of(folder, plan_file_name(key), key) : MappedFile();
}

}  // namespace tmd::internal
