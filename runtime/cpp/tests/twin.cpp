// Answers questions about the inside of the library: one JSON object per line in, one per line out.
//
// For the Python tests that hold both implementations to each other. An answer has "ok" and what was asked, or "status"
// and "error". Arrays of float32 travel as hexadecimal bytes.
#include <cstdio>
#include <cstring>
#include <iostream>

#include <nlohmann/json.hpp>

#include "bundle.hpp"
#include "clean_prompt.hpp"
#include "context.hpp"
#include "cpu.hpp"
#include "memory.hpp"
#include "mojibake.hpp"
#include "noise.hpp"
#include "onnxruntime_lowering.hpp"
#include "plan_cache.hpp"
#include "rules.hpp"
#include "schedule.hpp"
#include "tokenizer.hpp"
#include "utf8.hpp"

namespace {

using nlohmann::json;
using namespace tmd::internal;

std::string to_hex(const void* data, std::size_t size) {
  std::string out;
  for (std::size_t i = 0; i < size; ++i) {
    const auto byte = static_cast<const unsigned char*>(data)[i];
    out += "0123456789abcdef"[byte >> 4];
    out += "0123456789abcdef"[byte & 15];
  }
  return out;
}

std::string from_hex(const std::string& hex) {
  std::string out;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
    out += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return out;
}

std::vector<float> floats(const std::string& hex) {
  const std::string bytes = from_hex(hex);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

std::string hex(const std::vector<float>& values) { return to_hex(values.data(), values.size() * sizeof(float)); }

json answer(const json& question) {
  const std::string what = question.at("do");
  if (what == "bundle") {
    Bundle::open(question.at("path"));
    return {{"ok", true}};
  }
  if (what == "manifest") {
    parse_manifest(from_hex(question.at("data")), "manifest.json");
    return {{"ok", true}};
  }
  if (what == "build_info") return {{"ok", tmd_build_info()}};
  if (what == "lower") {
    const std::string lowered =
        lower_for_onnxruntime(from_hex(question.at("model")), "it.onnx", question.value("unsigned", false));
    return {{"ok", to_hex(lowered.data(), lowered.size())}};
  }
  if (what == "plan_key") {
    const Bundle bundle = Bundle::open(question.at("bundle"));
    const PlanTarget target{question.at("version"), question.at("device"), question.at("capability"),
                            question.at("streaming")};
    return {{"ok", plan_key(bundle, bundle.graph(question.at("graph"), "be asked"), question.at("shapes"), target)}};
  }
  if (what == "plan_file") return {{"ok", plan_file_name(question.at("key"))}};
  if (what == "plan_folder") return {{"ok", plan_folder(question.at("cache"))}};
  if (what == "find_plan") {
    const std::string content = find_plan(question.at("folder"), question.at("key").get<PlanKey>());
    return {{"ok", to_hex(content.data(), content.size())}};
  }
  if (what == "fast_unsigned") return {{"ok", fast_unsigned_products()}};
  if (what == "available") {
    const std::optional<std::uint64_t> free = available_bytes(question.at("root"));
    return {{"ok", free ? json(*free) : json()}};
  }
  if (what == "memory_mode") {  // "low" or not, for each size in turn
    const auto shared = std::make_shared<Shared>();
    shared->bundle = Bundle::open(question.at("bundle"));
    shared->system_root = question.at("root");
    const Log silent;
    Pipeline pipeline(shared, &silent);
    std::string warnings;
    json modes;
    for (const json& size : question.at("sizes")) {
      pipeline.prepare({size[0], size[1], size[2]}, warnings);
      modes.push_back(pipeline.one_after_the_other());
    }
    return {{"ok", modes}, {"warnings", warnings}};
  }
  if (what == "need") {
    const auto& size = question.at("size");
    const Need need = estimate_need(Bundle::open(question.at("bundle")).manifest, {size[0], size[1], size[2]});
    return {{"ok", {need.all, need.low}}};
  }
  if (what == "clean") return {{"ok", clean_prompt(question.at("text").get<std::string>())}};
  if (what == "is_bad") return {{"ok", looks_wrongly_decoded(decode_utf8(question.at("text").get<std::string>()))}};
  if (what == "tokens") {
    static std::string loaded;
    static std::unique_ptr<Tokenizer> tokenizer;
    if (const std::string path = question.at("bundle"); path != loaded) {
      tokenizer = std::make_unique<Tokenizer>(Bundle::open(path));
      loaded = path;
    }
    const Tokens tokens = (*tokenizer)(question.at("text").get<std::string>(), question.value("may_be_empty", false));
    return {{"ok", tokens.ids}, {"mask", tokens.mask}, {"dropped", tokens.dropped}};
  }
  if (what == "embeds") return {{"ok", hex(embed_tokens(Bundle::open(question.at("bundle")), question.at("ids")))}};
  if (what == "rope") {
    const std::int64_t grid[3] = {question.at("grid")[0], question.at("grid")[1], question.at("grid")[2]};
    const std::int64_t head_dim = question.at("head_dim");
    std::vector<float> cosine(static_cast<std::size_t>(grid[0] * grid[1] * grid[2] * (head_dim / 2))), sine(cosine);
    rope_tables(grid, head_dim, cosine.data(), sine.data());
    return {{"ok", hex(cosine)}, {"sine", hex(sine)}};
  }
  if (what == "grid") return {{"ok", shift_grid(question.at("steps"), question.at("shift"), question.at("t_max"))}};
  if (what == "wan_grid") return {{"ok", wan_grid(question.at("steps"), question.at("shift"))}};
  if (what == "told") return {{"ok", told_time(question.at("t"), question.at("rounding"))}};
  if (what == "rule") {  // a run of a rule on given velocities
    std::vector<float> x = floats(question.at("x"));
    NoiseStream stream(question.at("seed"));
    const std::unique_ptr<Rule> rule = make_rule(question.at("rule"));
    rule->start(question.at("times"), x.size(), &stream);
    std::size_t i = 0;
    for (const json& velocity : question.at("velocities")) {
      std::vector<float> v = floats(velocity);
      rule->step(i++, x.data(), v.data());
    }
    return {{"ok", hex(x)}};
  }
  if (what == "settings") {
    tmd_run_options options;
    tmd_run_options_init(&options);
    options.seed = 1;
    const json& wishes = question.at("wishes");
    const auto take = [&](const char* name, auto& place) {
      if (wishes.contains(name)) place = wishes.at(name);
    };
    take("steps", options.steps), take("inner_steps", options.inner_steps), take("frames", options.frames);
    take("width", options.width), take("height", options.height);
    take("guidance", options.guidance), take("shift", options.shift);
    const std::string negative = wishes.value("negative_prompt", "");
    if (wishes.contains("negative_prompt")) options.negative_prompt = negative.c_str();
    const Settings s = resolve_settings(parse_manifest(from_hex(question.at("manifest")), "manifest.json"), options);
    return {
        {"ok", {s.steps, s.inner_steps, s.frames, s.width, s.height, s.latent_frames, s.latent_height, s.latent_width}},
        {"times", s.times},
        {"nfe", s.nfe},
        {"guidance", s.guidance},
        {"negative_prompt", s.negative_prompt},
        {"warnings", s.warnings}};
  }
  return {{"error", "no such question"}};
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    json reply;
    try {
      reply = answer(json::parse(line));
    } catch (const Error& error) {
      reply = {{"status", error.status()}, {"error", error.what()}};
    } catch (const std::exception& error) {
      reply = {{"status", -1}, {"error", error.what()}};
    }
    std::cout << reply.dump(-1, ' ', true, json::error_handler_t::replace) << std::endl;
  }
}
