// What the answers of the twin share: arrays as hexadecimal bytes, wishes, and the context that is open.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "api/context.hpp"

namespace twin {

using nlohmann::json;
using namespace tmd::internal;

inline std::string to_hex(const void* data, std::size_t size) {
  std::string out;
  for (std::size_t i = 0; i < size; ++i) {
    const auto byte = static_cast<const unsigned char*>(data)[i];
    out += "0123456789abcdef"[byte >> 4];
    out += "0123456789abcdef"[byte & 15];
  }
  return out;
}

inline std::string from_hex(const std::string& hex) {
  std::string out;
  out.reserve(hex.size() / 2);
  const auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) out += static_cast<char>(digit(hex[i]) << 4 | digit(hex[i + 1]));
  return out;
}

inline std::vector<float> floats(const std::string& hex) {
  const std::string bytes = from_hex(hex);
  std::vector<float> values(bytes.size() / sizeof(float));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

inline std::string hex(const std::vector<float>& values) { return to_hex(values.data(), values.size() * sizeof(float)); }

// Options of a run from those wishes that a test has; strings and arrays stay in `kept`.
struct Wishes {
  explicit Wishes(const json& given) : kept(given) {
    tmd_run_options_init(&options);
    options.seed = 1;
    const auto take = [&](const char* name, auto& place) {
      if (kept.contains(name)) place = kept.at(name);
    };
    take("seed", options.seed), take("steps", options.steps), take("inner_steps", options.inner_steps);
    take("frames", options.frames), take("width", options.width), take("height", options.height);
    take("guidance", options.guidance), take("shift", options.shift), take("label", options.label);
    take("rho", options.rho), take("deadline", options.deadline), take("strength", options.strength);
    negative = kept.value("negative_prompt", "");
    if (kept.contains("negative_prompt")) options.negative_prompt = negative.c_str();
    schedule = kept.value("schedule", std::vector<double>());
    if (kept.contains("schedule")) options.schedule = schedule.data();
    options.schedule_count = static_cast<std::int32_t>(schedule.size());
    init = floats(kept.value("init_latents", ""));
    if (!init.empty()) options.init_latents = init.data();
  }
  Wishes(const Wishes&) = delete;

  json kept;
  tmd_run_options options;
  std::string negative;
  std::vector<double> schedule;
  std::vector<float> init;
};

// Throws what a function of the interface answers with.
inline void check(tmd_context* context, tmd_status status) {
  if (status != TMD_OK) throw Error(status, tmd_error(context));
}

// The context of the bundle and engine that were asked for last.
inline tmd_context* opened_for(const json& question) {
  static std::unique_ptr<tmd_context, void (*)(tmd_context*)> context(nullptr, tmd_free);
  static json key;
  const json wanted = {question.at("bundle"), question.at("engine"), question.value("memory", 0),
                       question.value("plan_cache", "")};
  if (context && key == wanted) return context.get();
  tmd_context* made = nullptr;
  tmd_create(&made);
  context.reset(made);
  key = nullptr;
  tmd_open_options options;
  tmd_open_options_init(&options);
  const std::string path = wanted[0], engine = wanted[1], cache = wanted[3], library = question.value("library", "");
  options.engine = engine.c_str();
  options.engine_library = library.empty() ? nullptr : library.c_str();
  options.plan_cache = cache.empty() ? nullptr : cache.c_str();
  options.threads = 1;
  options.memory = wanted[2];
  check(made, tmd_open(made, path.c_str(), &options));
  key = wanted;
  return made;
}

// Of the machine, its signals and its locale (twin_machine.cpp); null if there is no such question.
json answer_about_machine(const json& question);

}  // namespace twin
