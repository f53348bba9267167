#include "engines/plan_folder.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "base/quote.hpp"
#include "bundle/json_fields.hpp"
#include "tmd/tmd.h"

namespace tmd::internal {
namespace {

using nlohmann::json;

constexpr const char* kManifest = "manifest.json";
constexpr const char* kCapability = "compute capability";
constexpr std::uint64_t kMaxManifest = std::uint64_t{1} << 20;
constexpr std::int64_t kMaxBytes = std::int64_t{1} << 40;
constexpr int kPlansSchema = 1;

// This library's name for the program that lowers graphs as it expects: what a key calls "lowered" follows from the
// other fields and from that program's version.
std::string own_maker() { return std::string("tmd-engine ") + tmd_version(); }

bool is_bytes(const json& value) {
  return value.is_number_integer() &&
         !(value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(kMaxBytes)) &&
         value.get<std::int64_t>() >= 0 && value.get<std::int64_t>() <= kMaxBytes;
}

template <typename Check>
bool is_object_of(const json& value, const Check& check) {
  return value.is_object() && std::all_of(value.begin(), value.end(), check);
}

// One of "plans". Throws Error(BUNDLE) with the reason alone.
PlanFolder::Entry entry_from(const json& document) {
  const auto part = [&](const char* name) {
    return document.is_object() && document.contains(name) ? document[name] : json();
  };
  PlanFolder::Entry entry;
  const std::string where, place;
  const json file = part("file"), size = part("size"), sha256 = part("sha256"), key = part("key"),
             figures = part("figures");
  const auto proper = [](const char* name, const auto& read) {
    try {
      return read();
    } catch (const Error&) {
      refuse_bundle(std::string("an entry has no proper ") + name);
    }
  };
  entry.file = proper("file", [&] { return Field(&file, place, &where).file_name(); });
  entry.sha256 = proper("sha256", [&] { return Field(&sha256, place, &where).sha256(); });
  if (!is_bytes(size)) refuse_bundle("an entry has no proper size");
  entry.size = size.get<std::uint64_t>();
  if (!is_object_of(key, [](const json& value) { return value.is_string(); }))
    refuse_bundle("an entry has no proper key");
  entry.key = key.get<PlanKey>();
  if (!figures.is_null() || (document.is_object() && document.contains("figures"))) {
    if (!is_object_of(figures, is_bytes)) refuse_bundle("an entry has no proper figures");
    entry.figures = figures.get<std::map<std::string, std::int64_t>>();
  }
  return entry;
}

}  // namespace

PlanFolder::PlanFolder(std::string path) : path_(std::move(path)) {
  json version;
  try {
    const json document =
        read_strict_json(open_regular(path_, kManifest).read_up_to(kMaxManifest, path_ + "/" + kManifest), kManifest);
    if (!document.is_object() || !document.contains("schema_version")) refuse_bundle("it has no schema_version");
    version = document["schema_version"];
    if (version == json(kPlansSchema) && version.is_number_integer()) {
      if (!document.contains("plans") || !document["plans"].is_array()) refuse_bundle("it has no list of plans");
      for (const json& each : document["plans"]) entries_.push_back(entry_from(each));
      const json made_by = document.value("made_by", json());
      made_by_ = made_by.is_string() ? made_by.get<std::string>() : "nothing";
      return;
    }
  } catch (const Error& error) {
    fail_engine(path_ + " is not a folder of plans (" + bare(error.what(), 200) +
                "): make one with tmd-engine build BUNDLE --engine tensorrt-rtx --out PLANS.");
  }
  fail_engine(path_ + "/" + kManifest + " has schema_version " +
              quote(version.is_string() ? version.get<std::string>() : version.dump()) +
              ", and this version of tmd reads " + std::to_string(kPlansSchema) +
              ": build the plans again with tmd-engine build --out.");
}

std::uint64_t PlanFolder::scratch() const {
  std::int64_t largest = 0;
  for (const Entry& entry : entries_)
    if (const auto found = entry.figures.find("scratch"); found != entry.figures.end())
      largest = std::max(largest, found->second);
  return static_cast<std::uint64_t>(largest);
}

std::vector<std::string> PlanFolder::differences_of(const Entry& entry, PlanKey wanted, Capability gpu) const {
  std::vector<std::string> found;
  PlanKey there = entry.key;
  const std::string stated = there.count(kCapability) ? there[kCapability] : "";
  if (!plan_runs_on(stated, gpu)) found.push_back(difference(kCapability, stated, to_text(gpu)));
  if (made_by_ != own_maker()) found.push_back(difference("made by", made_by_, own_maker()));
  there.erase(kCapability);
  wanted.erase(kCapability);
  const std::vector<std::string> others = differences(there, wanted);
  found.insert(found.end(), others.begin(), others.end());
  return found;
}

FoundPlan PlanFolder::find(const PlanKey& wanted, Capability gpu) const {
  std::vector<std::string> closest;
  for (const Entry& entry : entries_) {
    if (!is_for_graph_and_sizes(entry.key, wanted)) continue;
    const std::vector<std::string> found = differences_of(entry, wanted, gpu);
    if (found.empty()) return {entry.key, read(entry)};
    if (closest.empty() || found.size() < closest.size()) closest = found;
  }
  const std::string graph = bare(wanted.at("title"));
  if (closest.empty()) fail_engine(path_ + " has no plan of " + graph + " for " + wanted.at("shapes"));
  fail_engine("the plan of " + graph + " in " + path_ + " is for something else (" + closest[0] +
              (closest.size() > 1 ? "; " + closest[1] : "") + ")");
}

MappedFile PlanFolder::read(const Entry& entry) const {
  const std::string plan = "The plan " + path_ + "/" + entry.file;
  MappedFile content;
  try {
    content = MappedFile(open_regular(path_, entry.file));
  } catch (const Error& error) {
    fail_engine(plan + " cannot be read: " + error.what());
  }
  if (content.bytes().size() != entry.size)
    fail_engine(plan + " has " + std::to_string(content.bytes().size()) + " bytes, and the manifest says " +
                std::to_string(entry.size) + ": the copy is incomplete. Copy the folder again.");
  if (sha256_hex(content.bytes()) != entry.sha256)
    fail_engine(plan + " is not what its manifest says (sha256): copy the folder again.");
  return content;
}

}  // namespace tmd::internal
