// Answers questions about the inside of the library: one JSON object per line in, one per line out.
//
// For the Python tests that hold both implementations to each other. An answer has "ok" and what was asked, or "status"
// and "error". Arrays of float32 travel as hexadecimal bytes.
#include <cstdio>
#include <iostream>

#include <nlohmann/json.hpp>

#include "base/utf8.hpp"
#include "bundle/geometry.hpp"
#include "bundle/graph_file.hpp"
#include "bundle/graph_shapes.hpp"
#include "bundle/reader.hpp"
#include "engines/cpu.hpp"
#include "engines/onnxruntime_lowering.hpp"
#include "run/memory.hpp"
#include "sampling/deadline.hpp"
#include "sampling/noise.hpp"
#include "sampling/rules.hpp"
#include "sampling/schedule.hpp"
#include "text/charsmap.hpp"
#include "text/clean_prompt.hpp"
#include "text/embedding.hpp"
#include "text/mojibake.hpp"
#include "text/tokenizer.hpp"
#include "text/vocabulary.hpp"
#include "twin_plans.hpp"
#include "twin_tools.hpp"

namespace {

using namespace twin;

Holding holding_of(const json& question) {
  return question.value("engine", "") == "openvino" ? kOpenVinoHolding : kOnnxRuntimeHolding;
}

// A whole run through the public interface.
json run(const json& question) {
  tmd_context* context = opened_for(question);
  Wishes wishes(question.at("wishes"));
  struct Seen {
    std::vector<std::string> previews;
    std::vector<double> fractions;
  } seen;
  wishes.options.user = &seen;
  if (question.value("previews", false))
    wishes.options.on_preview = [](void* user, const std::uint8_t* rgb, std::int32_t first, std::int32_t count,
                                   std::int32_t width, std::int32_t height) {
      auto& previews = static_cast<Seen*>(user)->previews;
      if (first == 0) previews.emplace_back();
      previews.back() += to_hex(rgb, static_cast<std::size_t>(count * width * height * 3));
      return 0;
    };
  wishes.options.on_progress = [](void* user, const tmd_progress* progress) {
    static_cast<Seen*>(user)->fractions.push_back(progress->fraction);
    return 0;
  };
  tmd_plan plan;
  tmd_plan_init(&plan);
  check(context, tmd_plan_run(context, &wishes.options, &plan));
  tmd_result result;
  tmd_result_init(&result);
  std::vector<std::uint8_t> frames(plan.frames_size);
  const std::string prompt = question.value("prompt", "");
  check(context, tmd_generate(context, question.contains("prompt") ? prompt.c_str() : nullptr, &wishes.options,
                              frames.data(), frames.size(), &result));
  json times = json::array();
  for (std::int32_t k = 0; k < result.times_count; ++k) times.push_back(result.times[k]);
  return {{"ok", to_hex(frames.data(), frames.size())},
          {"times", times},
          {"steps", result.steps},
          {"seconds", std::vector<double>(result.seconds, result.seconds + TMD_STAGES)},
          {"dropped", result.dropped_tokens},
          {"previews", seen.previews},
          {"fractions", seen.fractions},
          {"warnings", tmd_warnings(context)}};
}

// The stages one by one, with embeddings and latents in between.
json stages(const json& question) {
  tmd_context* context = opened_for(question);
  tmd_description of;
  tmd_description_init(&of);
  check(context, tmd_describe(context, &of));
  Wishes wishes(question.at("wishes"));
  tmd_plan plan;
  tmd_plan_init(&plan);
  check(context, tmd_plan_run(context, &wishes.options, &plan));
  std::vector<float> embeds(plan.embeds_count), latents(plan.latents_count);
  tmd_result result;
  tmd_result_init(&result);
  if (question.contains("tokens")) {  // zeros in the place of a prompt's embeddings
    result.tokens = question.at("tokens");
    embeds.assign(static_cast<std::size_t>(result.tokens * of.text_dim), 0.0f);
  } else if (!of.classes) {
    const std::string prompt = question.at("prompt");
    check(context, tmd_encode(context, prompt.c_str(), embeds.data(), embeds.size(), &result));
  }
  check(context, tmd_denoise(context, of.classes ? nullptr : embeds.data(), nullptr, result.tokens, &wishes.options,
                             latents.data(), latents.size(), nullptr));
  std::vector<std::uint8_t> frames(plan.frames_size);
  check(context, tmd_decode(context, latents.data(), plan.latent_frames, plan.latent_height, plan.latent_width, nullptr,
                            frames.data(), frames.size(), nullptr));
  return {{"ok", to_hex(frames.data(), frames.size())}, {"latents", hex(latents)}, {"tokens", result.tokens}};
}

json describe(const json& question) {
  tmd_context* context = opened_for(question);
  tmd_description of;
  tmd_description_init(&of);
  check(context, tmd_describe(context, &of));
  return {{"ok",
           {{"family", of.family},
            {"architecture", of.architecture},
            {"rule", of.rule},
            {"engine_version", of.engine_version},
            {"steps", of.steps},
            {"inner_steps", of.inner_steps},
            {"allowed_steps", std::vector<std::int32_t>(of.allowed_steps, of.allowed_steps + of.allowed_steps_count)},
            {"allowed_inner_steps",
             std::vector<std::int32_t>(of.allowed_inner_steps, of.allowed_inner_steps + of.allowed_inner_steps_count)},
            {"can_denoise", of.can_denoise},
            {"classes", of.classes},
            {"first_frame", of.first_frame}}}};
}

json encode_image(const json& question) {
  tmd_context* context = opened_for(question);
  tmd_description of;
  tmd_description_init(&of);
  check(context, tmd_describe(context, &of));
  const std::string rgb = from_hex(question.at("rgb"));
  const std::int32_t width = question.at("width"), height = question.at("height");
  std::vector<float> latents(
      static_cast<std::size_t>(of.channels * (width / of.spatial_stride) * (height / of.spatial_stride)));
  tmd_result result;
  tmd_result_init(&result);
  check(context, tmd_encode_image(context, reinterpret_cast<const std::uint8_t*>(rgb.data()), width, height,
                                  latents.data(), latents.size(), &result));
  return {{"ok", hex(latents)}, {"seconds", result.seconds[TMD_STAGE_ENCODE]}};
}

// Every step that a deadline lets a run take, with the seconds left and the costs that a test says.
json steps_in_time(const json& question) {
  const std::vector<double> times = question.at("times"), left = question.at("left"), now = question.at("now"),
                            later = question.at("later");
  std::vector<double> way = {times.front()};
  auto most = static_cast<std::int64_t>(times.size()) - 1;
  for (std::size_t k = 0; way.back() > 0; ++k, --most)
    way.push_back(next_time(times, question.at("fixed"), way.back(), most, left.at(k), now.at(k), later.at(k)));
  return {{"ok", way}};
}

json answer(const json& question) {
  if (question.at("do") == "run") return run(question);
  if (question.at("do") == "stages") return stages(question);
  if (question.at("do") == "describe") return describe(question);
  if (question.at("do") == "encode_image") return encode_image(question);
  if (question.at("do") == "steps_in_time") return steps_in_time(question);
  const std::string what = question.at("do");
  if (what == "bundle") {
    Bundle::open(question.at("path"));
    return {{"ok", true}};
  }
  if (what == "manifest") {
    parse_manifest(from_hex(question.at("data")), "manifest.json");
    return {{"ok", true}};
  }
  if (what == "graphs") {  // what is said of each: nothing, or why it is refused
    const Manifest manifest = parse_manifest(from_hex(question.at("manifest")), "manifest.json");
    const GraphInfo& info = manifest.graphs.at(question.at("graph"));
    json refusals = json::array();
    for (const json& data : question.at("data")) {
      try {
        check_graph(from_hex(data), info, info.data ? manifest.files.at(*info.data).size : 0, info.file);
        refusals.push_back("");
      } catch (const Error& error) {
        if (error.status() != TMD_ERROR_BUNDLE) throw;
        refusals.push_back(error.what());
      }
    }
    return {{"ok", refusals}};
  }
  if (what == "facts") {  // what each graph says of patches and blocks
    const Manifest manifest = parse_manifest(from_hex(question.at("manifest")), "manifest.json");
    const GraphInfo& info = manifest.graphs.at(question.at("graph"));
    json answers = json::array();
    for (const json& data : question.at("data")) {
      const GraphFacts facts = facts_of(from_hex(data), info);
      answers.push_back({facts.divisors, facts.attentions});
    }
    return {{"ok", answers}};
  }
  if (what == "build_info") return {{"ok", tmd_build_info()}};
  if (what == "lower") {
    const std::string lowered =
        lower_for_onnxruntime(from_hex(question.at("model")), "it.onnx", question.value("unsigned", false));
    return {{"ok", to_hex(lowered.data(), lowered.size())}, {"widens", widens_in_products(lowered)}};
  }
  if (what.compare(0, 5, "plan_") == 0) return answer_about_plans(question);
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
      pipeline.prepare({size[0], size[1], size[2]}, kText | kDenoise | kDecode, warnings);
      modes.push_back(pipeline.one_after_the_other());
    }
    return {{"ok", modes}, {"warnings", warnings}};
  }
  if (what == "need") {
    const auto& size = question.at("size");
    const Bundle bundle = Bundle::open(question.at("bundle"));
    const Need need = estimate_need(bundle, {size[0], size[1], size[2]}, holding_of(question));
    return {{"ok", {need.all, need.low}}};
  }
  if (what == "graph_memory") {  // of a graph at given sizes: the shape of each tensor, and the peak between its nodes
    const Bundle bundle = Bundle::open(question.at("bundle"));
    const std::string content = bundle.read_graph(bundle.manifest.graphs.at(question.at("graph")));
    const ShapedGraph graph = infer_shapes(content, question.at("shapes").get<InputShapes>(), "it");
    json shapes;
    for (const auto& [name, tensor] : graph.tensors) shapes[std::string(name)] = tensor.shape;
    return {{"ok", shapes}, {"peak", peak_activation_bytes(graph, holding_of(question))}};
  }
  if (what == "charsmaps") return {{"ok", has_sound_charsmaps(from_hex(question.at("data")))}};
  if (what == "unknown_words") {
    const DrawsInfo draws = {question.at("words").get<std::vector<std::string>>(), question.at("description"),
                             question.at("example")};
    return {{"ok", unknown_words(question.at("text").get<std::string>(), draws)}};
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
  if (what == "embeds") {
    const Bundle bundle = Bundle::open(question.at("bundle"));
    return {{"ok", hex(read_rows(bundle, *bundle.manifest.text.embedding, question.at("ids")))}};
  }
  if (what == "rope") {
    const std::int64_t grid[3] = {question.at("grid")[0], question.at("grid")[1], question.at("grid")[2]};
    const std::int64_t head_dim = question.at("head_dim");
    std::vector<float> cosine(static_cast<std::size_t>(grid[0] * grid[1] * grid[2] * (head_dim / 2))), sine(cosine);
    rope_tables(grid, head_dim, cosine.data(), sine.data());
    return {{"ok", hex(cosine)}, {"sine", hex(sine)}};
  }
  if (what == "tim_rope") {
    const std::int64_t height = question.at("grid")[0], width = question.at("grid")[1];
    const std::int64_t head_dim = question.at("head_dim");
    std::vector<float> cosine(static_cast<std::size_t>(height * width * (head_dim / 2))), sine(cosine);
    tim_rope_tables(height, width, head_dim, question.at("rope"), cosine.data(), sine.data());
    return {{"ok", hex(cosine)}, {"sine", hex(sine)}};
  }
  if (what == "grid") return {{"ok", shift_grid(question.at("steps"), question.at("shift"), question.at("t_max"))}};
  if (what == "make_grid") return {{"ok", make_grid(question.at("name"), question.at("steps"), question.at("shift"))}};
  if (what == "told") return {{"ok", told_time(question.at("t"), question.at("rounding"))}};
  if (what == "rule") {  // the coefficients of every step
    const Rule rule = find_rule(question.at("rule"));
    const std::vector<double> times = question.at("times");
    json steps = json::array();
    for (std::size_t i = 0; i + 1 < times.size(); ++i) {
      const Coefficients c = rule(times, i);
      steps.push_back({c.x, c.velocity, c.noise, c.before_1, c.before_2});
    }
    return {{"ok", steps}};
  }
  if (what == "settings") {
    const Wishes wishes(question.at("wishes"));
    const Manifest manifest = parse_manifest(from_hex(question.at("manifest")), "manifest.json");
    const Settings s = resolve_settings(manifest, wishes.options);
    return {
        {"ok", {s.steps, s.inner_steps, s.frames, s.width, s.height, s.latent_frames, s.latent_height, s.latent_width}},
        {"times", s.times},
        {"nfe", s.nfe},
        {"guidance", s.guidance},
        {"rho", s.rho},
        {"negative_prompt", s.negative_prompt},
        {"warnings", s.warnings}};
  }
  if (json answer = answer_about_machine(question); !answer.is_null()) return answer;
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
