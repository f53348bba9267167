#include "engines/plan_cache.hpp"

#include <dirent.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/quote.hpp"
#include "bundle/files.hpp"

namespace tmd::internal {
namespace {

using nlohmann::json;

constexpr std::uint64_t kMaxLine = std::uint64_t{1} << 16, kMaxEntry = std::uint64_t{32} << 30;
constexpr const char* kEnding = ".plan";

bool begins(const std::string& text, const std::string& with) { return text.compare(0, with.size(), with) == 0; }

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

// "tensorrt 10.3.0" names every build of 10.3.0; which of the two a key has depends on how the package names itself.
bool same_version(const std::string& found, const std::string& wanted) {
  const std::size_t build = wanted.rfind('.');
  return found == wanted || begins(found, wanted + ".") || found == wanted.substr(0, build);
}

// Flags begin with "workspace N, ", and of those every N is as good.
std::string without_workspace(const std::string& flags) {
  const std::size_t comma = flags.find(", ");
  return begins(flags, "workspace ") && comma != std::string::npos ? flags.substr(comma) : flags;
}

bool same(const std::string& field, const std::string& found, const std::string& wanted) {
  if (field == "engine") return same_version(found, wanted);
  if (field == "flags") return without_workspace(found) == without_workspace(wanted);
  return found == wanted;
}

std::vector<std::string> differing(const PlanKey& found, const PlanKey& wanted) {
  std::vector<std::string> fields;
  for (const auto& [name, value] : wanted)
    if (const auto at = found.find(name); at == found.end() || !same(name, at->second, value)) fields.push_back(name);
  for (const auto& [name, value] : found)
    if (name != "lowered" && !wanted.count(name)) fields.push_back(name);
  return fields;
}

// The line that an entry begins with; absent if this is no entry.
std::optional<json> header_of(const std::string& line) {
  const json document = json::parse(line, nullptr, false);
  if (!document.is_object() || !document.contains("key") || !document["key"].is_object()) return std::nullopt;
  for (const auto& [name, value] : document["key"].items())
    if (!value.is_string()) return std::nullopt;
  return document;
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
      const std::optional<json> header = header_of(beginning.substr(0, beginning.find('\n')));
      struct stat status;
      if (header && ::fstat(file.descriptor(), &status) == 0)
        entries.push_back({name, (*header)["key"].get<PlanKey>(), status.st_mtim});
    } catch (const Error&) {  // no regular file, or unreadable: no entry
    }
  }
  return entries;
}

// The content of an entry if it is exactly what Python stored there.
std::optional<std::string> content_of(const std::string& folder, const Entry& entry) {
  if (entry.name != plan_file_name(entry.key)) return std::nullopt;
  std::string all;
  try {
    all = open_regular(folder, entry.name).read_up_to(kMaxEntry + kMaxLine, entry.name);
  } catch (const Error&) {
    return std::nullopt;
  }
  const std::size_t newline = all.find('\n');
  if (newline == std::string::npos) return std::nullopt;
  const std::string line = all.substr(0, newline);
  all.erase(0, newline + 1);
  const json expected = {{"key", entry.key}, {"sha256", sha256_hex(all)}, {"size", all.size()}};
  if (line != dump(expected)) return std::nullopt;
  return all;
}

// Who writes an entry decides what this process runs.
void check_trust(const std::string& folder) {
  struct stat status;
  if (::stat(folder.c_str(), &status) != 0) return;  // not there: it holds no plan, which is said elsewhere
  if (!S_ISDIR(status.st_mode) || status.st_uid != ::geteuid() || (status.st_mode & 022) != 0)
    fail_engine("the folder of plans " + quote(folder, 300) +
                " can be written by others than this user, or is no folder: chmod 700 it, or name another one in "
                "plan_cache.");
}

[[noreturn]] void tell_missing(const std::string& folder, const PlanKey& wanted, const std::vector<Entry>& entries) {
  std::string nearest;
  std::size_t fewest = SIZE_MAX;
  for (const Entry& entry : entries) {
    const auto found = [&](const std::string& name) {
      const auto at = entry.key.find(name);
      return at == entry.key.end() ? std::string("nothing") : at->second;
    };
    if (found("title") != wanted.at("title") || found("shapes") != wanted.at("shapes")) continue;
    const std::vector<std::string> fields = differing(entry.key, wanted);
    if (fields.empty() || fields.size() >= fewest) continue;
    fewest = fields.size();
    nearest = " The nearest one is for something else: ";
    for (std::size_t i = 0; i < std::min<std::size_t>(fields.size(), 2); ++i) {
      const auto here = wanted.find(fields[i]);
      nearest += (i ? "; " : "") + fields[i] + ": " + quote(found(fields[i])) + " there, " +
                 quote(here == wanted.end() ? "nothing" : here->second) + " here";
    }
    nearest += ".";
  }
  fail_engine("there is no TensorRT plan of " + quote(wanted.at("title")) + " for " + quote(wanted.at("shapes"), 300) +
              " in " + quote(folder, 300) + "." + nearest +
              " Build it here, with the same TensorRT: tmd-engine build BUNDLE --size WIDTHxHEIGHT --frames N.");
}

std::string home_folder() {
  passwd entry, *found = nullptr;
  std::vector<char> space(1 << 16);
  if (::getpwuid_r(::geteuid(), &entry, space.data(), space.size(), &found) != 0 || !found || !found->pw_dir)
    fail_engine("this user has no home folder, where plans would be: name a folder in plan_cache.");
  return found->pw_dir;
}

}  // namespace

PlanKey plan_key(const Bundle& bundle, const GraphInfo& info, const std::map<std::string, Shape>& inputs,
                 const PlanTarget& target) {
  std::string graph, hashes, shapes;
  for (const auto& [name, each] : bundle.manifest.graphs)
    if (each.file == info.file) graph = name;
  for (const std::string& file : {info.file, info.data.value_or("")})
    if (!file.empty()) hashes += (hashes.empty() ? "" : " ") + bundle.manifest.files.at(file).sha256;
  for (const auto& [name, shape] : inputs) {
    shapes += (shapes.empty() ? "" : ", ") + name + " ";
    for (std::size_t i = 0; i < shape.size(); ++i) shapes += (i ? "x" : "") + std::to_string(shape[i]);
  }
  return {{"title", bundle.manifest.model->name + " " + graph},
          {"graph", hashes},
          {"engine", "tensorrt " + target.version},
          {"device", target.device},
          {"compute capability", target.capability},
          {"precision", info.precision},
          {"shapes", shapes},
          {"flags", std::string("workspace None, weight streaming ") + (target.weight_streaming ? "True" : "False") +
                        ", no TF32"}};
}

std::string plan_file_name(const PlanKey& key) { return sha256_hex(dump(key)) + kEnding; }

std::string plan_folder(const std::string& cache) {
  return (cache.empty() ? home_folder() + "/.cache/tmd" : cache) + "/tensorrt";
}

std::string find_plan(const std::string& folder, const PlanKey& key) {
  check_trust(folder);
  std::vector<Entry> entries = entries_of(folder);
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.changed.tv_sec != b.changed.tv_sec ? a.changed.tv_sec > b.changed.tv_sec
                                                : a.changed.tv_nsec > b.changed.tv_nsec;
  });
  for (const Entry& entry : entries)
    if (entry.key.count("lowered") && differing(entry.key, key).empty())
      if (std::optional<std::string> content = content_of(folder, entry)) return *std::move(content);
  tell_missing(folder, key, entries);
}

}  // namespace tmd::internal
