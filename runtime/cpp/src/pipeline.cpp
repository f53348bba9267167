#include "pipeline.hpp"

#include <algorithm>

#include "files.hpp"

namespace tmd::internal {
namespace {

constexpr std::int64_t kGraphs = 5;  // text_encoder, backbone, flow_head, decoder_first, decoder_step

std::string seconds_text(double seconds) {
  const auto thousandths = static_cast<long>(seconds * 1000);
  return std::to_string(thousandths) + " ms";
}

}  // namespace

std::shared_ptr<const Tokenizer> Shared::tokenizer() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!tokenizer_) tokenizer_ = std::make_shared<const Tokenizer>(bundle);
  return tokenizer_;
}

std::shared_ptr<LoadedGraph> Shared::graph(const std::string& name, const char* purpose, bool* fresh) {
  const GraphInfo& info = bundle.graph(name, purpose);
  // Held while a graph loads: a clone that wants the same one waits for it instead of loading it twice.
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<LoadedGraph> graph = graphs_[name].lock();
  *fresh = graph == nullptr;
  if (*fresh) graphs_[name] = graph = engine->load(bundle, info);
  return graph;
}

std::shared_ptr<LoadedGraph> Pipeline::graph(const std::string& name, const char* purpose, Progress& progress) {
  if (const auto found = graphs_.find(name); found != graphs_.end()) return found->second;
  const Stopwatch load;
  bool fresh = false;
  std::shared_ptr<LoadedGraph> graph = shared_->graph(name, purpose, &fresh);
  graphs_[name] = graph;
  if (fresh) {
    const double seconds = load.seconds();
    (*log_)(TMD_LOG_INFO, "loaded the graph " + name + " in " + seconds_text(seconds));
    progress.add(TMD_STAGE_LOAD, seconds);
    progress.report(TMD_STAGE_LOAD, static_cast<std::int64_t>(graphs_.size()), kGraphs, seconds);
  }
  return graph;
}

void Pipeline::prepare(const LatentSize& size, std::string& warnings) {
  // Of a device's memory nothing is estimated.
  if (shared_->memory != TMD_MEMORY_AUTO || (shared_->engine && shared_->engine->on_device())) {
    one_after_the_other_ = shared_->memory == TMD_MEMORY_LOW;
    return;
  }
  // Runs of one size keep the decision of the first: what that one left loaded is not free any more.
  if (prepared_ && *prepared_ == size) return;
  const std::optional<std::uint64_t> free = available_bytes(shared_->system_root);
  const Need need = estimate_need(manifest(), size);
  std::uint64_t loaded = 0;
  for (const auto& [name, graph] : graphs_) loaded += weight_bytes(manifest(), graph->info());
  const bool fits = !free || need.all <= *free + loaded;
  if (!fits && need.low > *free + loaded)
    warnings += "this run takes about " + format_size(need.low) +
                " of memory even with one stage after the other, and " + format_size(*free + loaded) +
                " are free; fewer frames or a smaller size take less.\n";
  (*log_)(TMD_LOG_INFO, "the run takes about " + format_size(need.all) + " with every graph loaded" +
                            (fits ? "" : ", more than is free: one stage after the other"));
  if (!fits && !one_after_the_other_) unload();
  one_after_the_other_ = !fits;
  prepared_ = size;
}

void Pipeline::release(std::initializer_list<const char*> graphs) {
  if (!one_after_the_other_) return;
  for (const char* name : graphs) graphs_.erase(name);
}

void Pipeline::unload() {
  loop_.reset();
  decoder_.reset();
  graphs_.clear();
  negative_.reset();
  prepared_.reset();
}

Tokens Pipeline::tokenize(std::string_view prompt, bool may_be_empty) const {
  return (*shared_->tokenizer())(prompt, may_be_empty);
}

std::vector<float> Pipeline::encode(std::string_view prompt, Progress& progress, std::int64_t expected,
                                    std::string& warnings, std::int32_t* dropped) {
  const Stopwatch tokenizing;
  const Tokens tokens = tokenize(prompt);
  progress.add(TMD_STAGE_TEXT, tokenizing.seconds());
  if (tokens.dropped) warnings += tokens.warning() + "\n";
  *dropped = tokens.dropped;
  return encode_tokens(tokens, progress, 1, expected);
}

const std::vector<float>& Pipeline::encode_negative(const std::string& prompt, Progress& progress) {
  if (!negative_ || negative_->first != prompt) {
    negative_.reset();
    negative_.emplace(prompt, encode_tokens(tokenize(prompt, true), progress, 2, 2));
  }
  return negative_->second;
}

std::vector<float> Pipeline::encode_tokens(const Tokens& tokens, Progress& progress, std::int64_t done,
                                           std::int64_t total) {
  const std::shared_ptr<LoadedGraph> encoder = graph("text_encoder", "read a prompt", progress);
  const Stopwatch encoding;
  const Dims dims = {{"batch", 1}, {"text", manifest().text.max_length}};
  Buffers inputs;
  const auto put = [&](const char* name, const auto& values) {
    Buffer buffer = encoder->empty(name, dims);
    if (buffer.bytes() != values.size() * sizeof values[0])
      fail_run(std::string("the text encoder of this bundle takes another ") + name +
               " than its manifest says. Export it again.");
    std::memcpy(buffer.data(), values.data(), buffer.bytes());
    buffer.upload();
    inputs[name] = buffer;
  };
  put("attention_mask", tokens.mask);
  if (manifest().text.embedding) {
    put("token_embeds", embed_tokens(shared_->bundle, tokens.ids));
  } else {
    put("input_ids", tokens.ids);
  }
  const Buffer embeds = encoder->empty("prompt_embeds", dims);
  if (embeds.dtype() != DType::f32) fail_run("the text encoder of this bundle gives no float32. Export it again.");
  encoder->bind(inputs, {{"prompt_embeds", embeds}})->run();
  embeds.download();
  check_finite(TMD_STAGE_TEXT, embeds.as<float>(), embeds.count());
  std::vector<float> values(embeds.as<float>(), embeds.as<float>() + embeds.count());
  const double seconds = encoding.seconds();
  progress.add(TMD_STAGE_TEXT, seconds);
  progress.report(TMD_STAGE_TEXT, done, total, seconds);
  return values;
}

std::vector<float> Pipeline::denoise(const float* embeds, const float* negative, std::int64_t tokens,
                                     const Settings& settings, Progress& progress) {
  release({"text_encoder"});
  const std::vector<std::int64_t> key = {settings.latent_frames, settings.latent_height, settings.latent_width, tokens};
  if (!loop_ || loop_key_ != key) {
    const auto backbone = graph("backbone", "denoise", progress);
    const auto flow_head = graph("flow_head", "denoise", progress);
    const Stopwatch load;
    loop_.reset();
    loop_ = make_loop(manifest(), backbone, flow_head, settings, tokens);  // an engine may compile for the shape here
    loop_key_ = key;
    progress.add(TMD_STAGE_LOAD, load.seconds());
  }
  std::vector<float> latents(static_cast<std::size_t>(settings.channels * settings.latent_frames *
                                                      settings.latent_height * settings.latent_width));
  loop_->run(embeds, negative, settings, progress, latents.data());
  return latents;
}

void Pipeline::decode(const float* latents, std::int64_t frames, std::int64_t height, std::int64_t width,
                      const Decoder::Pieces& pieces, Progress& progress) {
  if (one_after_the_other_) loop_.reset();
  release({"backbone", "flow_head"});
  const std::vector<std::int64_t> key = {height, width};
  if (!decoder_ || decoder_key_ != key) {
    const auto first = graph("decoder_first", "turn latents into frames", progress);
    const Stopwatch load;
    decoder_.reset();
    decoder_ = std::make_unique<Decoder>(first, manifest().latents, height, width);
    decoder_key_ = key;
    progress.add(TMD_STAGE_LOAD, load.seconds());
  }
  check_finite(TMD_STAGE_FLOW_HEAD, latents,
               static_cast<std::size_t>(manifest().latents.channels * frames * height * width));
  const auto load_step = [&] { return graph("decoder_step", "turn latents into more than one frame", progress); };
  decoder_->run(latents, frames, load_step, pieces, progress);
  if (one_after_the_other_) decoder_.reset();
  release({"decoder_first", "decoder_step"});
}

}  // namespace tmd::internal
