#include "twin_plans.hpp"

#include "engines/compute_capability.hpp"
#include "engines/plan_cache.hpp"
#include "engines/plan_folder.hpp"

using nlohmann::json;
using namespace tmd::internal;

namespace {

// Plans of tests are text.
json found(const FoundPlan& plan) { return {{"ok", plan.content.bytes()}, {"key", plan.key}}; }

Capability gpu_of(const json& question) { return {question.at("gpu")[0], question.at("gpu")[1]}; }

}  // namespace

json answer_about_plans(const json& question) {
  const std::string what = question.at("do").get<std::string>().substr(5);
  const auto key = [&] { return question.at("key").get<PlanKey>(); };
  const std::string folder = question.value("folder", "");
  if (what == "key") {
    const Bundle bundle = Bundle::open(question.at("bundle"));
    const PlanTarget target{question.value("engine", "tensorrt"), question.at("version"), question.at("device"),
                            question.at("capability"), question.at("streaming")};
    return {{"ok", plan_key(bundle, bundle.graph(question.at("graph"), "be asked"), question.at("shapes"), target)}};
  }
  if (what == "file") return {{"ok", plan_file_name(key())}};
  if (what == "bytes_together")
    return {{"ok", stored_bytes_together(Bundle::open(question.at("bundle")).manifest, question.at("graph"))}};
  if (what == "cache") return {{"ok", plan_cache_folder(question.at("cache"))}};
  if (what == "find") return found(find_plan(folder, key()));
  if (what == "load") {
    const MappedFile content = load_entry(folder, key());
    return {{"ok", content.bytes().data() ? json(content.bytes()) : json()}};
  }
  if (what == "store") {
    store_entry(folder, key(), question.at("content").get<std::string>());
    return {{"ok", true}};
  }
  if (what == "folder") {  // what it holds
    json entries = json::array();
    const PlanFolder plans(folder);
    for (const PlanFolder::Entry& entry : plans.entries())
      entries.push_back({entry.file, entry.size, entry.sha256, entry.key, entry.figures});
    return {{"ok", entries}, {"scratch", plans.scratch()}};
  }
  if (what == "in_folder") return found(PlanFolder(folder).find(key(), gpu_of(question)));
  if (what == "runs_on") return {{"ok", plan_runs_on(question.at("stated"), gpu_of(question))}};
  if (what == "refusal") return {{"ok", refusal_on(question.at("precision"), gpu_of(question))}};
  return {{"error", "no such question"}};
}
