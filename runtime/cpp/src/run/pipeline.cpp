#include "run/pipeline.hpp"

#include <algorithm>
#include <numeric>

#include "autoencoder/encoder.hpp"
#include "base/stopping.hpp"
#include "bundle/files.hpp"
#include "text/vocabulary.hpp"

namespace tmd::internal {
namespace {

std::string seconds_text(double seconds) {
  const auto thousandths = static_cast<long>(seconds * 1000);
  return std::to_string(thousandths) + " ms";
}

// A file of some kilobytes can ask for any memory.
void refuse_beyond(const Need& need, Stages stages, std::uint64_t free) {
  const std::uint64_t most = need.surely(stages);
  if (most <= free) return;
  throw Error(TMD_ERROR_MEMORY, "there is not enough memory: this run takes at least " + format_size(most) +
                                    " even with one stage after the other, and " + format_size(free) +
                                    " are free. Choose fewer frames, a smaller size or a bundle of lower precision, " +
                                    "or try all the same with TMD_MEMORY_LOW.");
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
  check_stopped();
  const Stopwatch load;
  bool fresh = false;
  std::shared_ptr<LoadedGraph> graph = shared_->graph(name, purpose, &fresh);
  graphs_[name] = graph;
  if (fresh) {
    const double seconds = load.seconds();
    (*log_)(TMD_LOG_INFO, "loaded the graph " + name + " in " + seconds_text(seconds));
    progress.add(TMD_STAGE_LOAD, seconds);
    progress.report(TMD_STAGE_LOAD, static_cast<std::int64_t>(graphs_.size()),
                    static_cast<std::int64_t>(manifest().graphs.size()), seconds);
  }
  return graph;
}

bool Pipeline::chooses() const {
  // Of a device's memory nothing is estimated.
  return shared_->memory == TMD_MEMORY_AUTO && !(shared_->engine && shared_->engine->on_device());
}

Holding Pipeline::holding() const { return shared_->engine ? shared_->engine->holding() : kOnnxRuntimeHolding; }

std::uint64_t Pipeline::free_bytes() const {
  const std::optional<std::uint64_t> free = available_bytes(shared_->system_root);
  if (!free) return UINT64_MAX;
  std::uint64_t loaded = 0;
  for (const auto& [name, graph] : graphs_) loaded += weight_bytes(manifest(), graph->info(), holding());
  return *free + loaded;
}

void Pipeline::check_one(Stages stage) {
  if (!chooses() || !(stage & ~checked_alone_)) return;
  const VideoInfo& video = manifest().video;
  const std::int64_t stride = manifest().latents.spatial_stride;
  const LatentSize size = {1, video.height / stride, video.width / stride};
  refuse_beyond(estimate_need(shared_->bundle, size, holding()), stage, free_bytes());
  checked_alone_ |= stage;
}

void Pipeline::prepare(const LatentSize& size, Stages stages, std::string& warnings) {
  if (!shared_->note.empty()) warnings += shared_->note + "\n";
  if (!chooses()) {
    one_after_the_other_ = shared_->memory == TMD_MEMORY_LOW;
    return;
  }
  // Runs of one size keep the decision of the first: what that one left loaded is not free any more.
  const bool same_size = prepared_ && *prepared_ == size;
  if (same_size && !(stages & ~checked_)) return;
  const std::uint64_t free = free_bytes();
  if (!same_size) {
    prepared_.reset();
    need_ = estimate_need(shared_->bundle, size, holding());
    checked_ = 0;
  }
  refuse_beyond(need_, stages, free);
  checked_ |= stages;
  if (same_size) return;
  const bool fits = need_.all <= free;
  if (!fits && need_.low > free)
    warnings += "this run takes about " + format_size(need_.low) +
                " of memory even with one stage after the other, and " + format_size(free) +
                " are free; fewer frames or a smaller size take less.\n";
  (*log_)(TMD_LOG_INFO, "the run takes about " + format_size(need_.all) + " with every graph loaded" +
                            (fits ? "" : ", more than is free: one stage after the other"));
  if (!fits && !one_after_the_other_) unload();
  one_after_the_other_ = !fits;
  prepared_ = size;
}

void Pipeline::release(std::initializer_list<const char*> graphs) {
  if (!one_after_the_other_) return;
  for (const char* name : graphs) graphs_.erase(name);
}

Transformer Pipeline::transformer(bool second, const std::function<void()>& let_go, Progress& progress) {
  if (one_after_the_other_) {
    let_go();
    for (const char* name : {"backbone", "flow_head"}) graphs_.erase(second ? name : std::string(name) + "_2");
  }
  const std::string suffix = second ? "_2" : "";
  return {graph("backbone" + suffix, "denoise to the end", progress),
          graph("flow_head" + suffix, "denoise to the end", progress)};
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
  if (const std::string note = unknown_words(prompt, manifest().draws); !note.empty()) warnings += note + "\n";
  *dropped = tokens.dropped;
  return encode_tokens(tokens, progress, 1, expected);
}

const std::vector<float>& Pipeline::encode_negative(const std::string& prompt, Progress& progress, std::int64_t total,
                                                    std::string& warnings) {
  if (!negative_ || negative_->prompt != prompt) {
    negative_.reset();
    const Tokens tokens = tokenize(prompt, true);
    negative_ = Negative{prompt, tokens.dropped ? tokens.warning("the negative prompt") + "\n" : "",
                         encode_tokens(tokens, progress, total, total)};
  }
  warnings += negative_->warning;
  return negative_->embeds;
}

std::vector<float> Pipeline::null_embeds(std::int64_t tokens) const {
  const std::optional<EmbeddingTable>& table = manifest().text.null_embeds;
  if (!table) return {};
  if (tokens > table->rows)
    fail_run("the prompt has " + std::to_string(tokens) + " rows of embeddings, and this bundle reads at most " +
             std::to_string(table->rows) + ".");
  std::vector<std::int64_t> rows(static_cast<std::size_t>(tokens));
  std::iota(rows.begin(), rows.end(), 0);
  return read_rows(shared_->bundle, *table, rows);
}

std::int64_t Pipeline::prompts(const Settings& settings) const {
  if (manifest().classes()) return 0;
  const bool kept = negative_ && negative_->prompt == settings.negative_prompt;
  return settings.passes() == 2 && !kept && !is_stored(settings) ? 2 : 1;
}

Condition Pipeline::condition(std::string_view prompt, const Settings& settings, Progress& progress,
                              std::string& warnings, std::int32_t* dropped) {
  Condition made;
  if (manifest().classes()) return made;
  const std::int64_t total = prompts(settings), dim = manifest().text.dim;
  const auto rows = [&](const std::vector<float>& embeds) { return static_cast<std::int64_t>(embeds.size()) / dim; };
  made.embeds = encode(prompt, progress, total, warnings, dropped);
  if (settings.passes() == 2)
    made.negative = is_stored(settings) ? null_embeds(rows(made.embeds))
                                        : encode_negative(settings.negative_prompt, progress, total, warnings);
  made.tokens = std::max(rows(made.embeds), rows(made.negative));
  // The shorter one is filled up with rows of the empty prompt: what the text encoder gives where it pads.
  const std::vector<float> null =
      made.negative.empty() || made.negative.size() == made.embeds.size() ? made.negative : null_embeds(made.tokens);
  for (std::vector<float>* embeds : {&made.embeds, &made.negative})
    if (!null.empty() && embeds->size() < null.size())
      embeds->insert(embeds->end(), null.begin() + static_cast<std::ptrdiff_t>(embeds->size()), null.end());
  if (!made.negative.empty() && made.negative.size() != made.embeds.size())
    fail_run(
        "the prompt and the negative prompt have embeddings of different lengths, and this bundle has no rows to "
        "fill up with. Export it again.");
  return made;
}

std::vector<float> Pipeline::encode_tokens(const Tokens& tokens, Progress& progress, std::int64_t done,
                                           std::int64_t total) {
  const std::shared_ptr<LoadedGraph> encoder = graph("text_encoder", "read a prompt", progress);
  Stopwatch encoding;
  const Dims dims = {{"batch", 1}, {"text", static_cast<std::int64_t>(tokens.ids.size())}};
  Buffers inputs;
  const auto put = [&](const char* name, const auto& values) {
    inputs[name] = encoder->empty(name, dims);
    inputs[name].write(values.data(), values.size());
  };
  // A causal encoder of a prompt without padding has no mask.
  if (manifest().text.is_padded()) put("attention_mask", tokens.mask);
  if (manifest().text.embedding) {
    put("token_embeds", read_rows(shared_->bundle, *manifest().text.embedding, tokens.ids));
  } else {
    put("input_ids", tokens.ids);
  }
  const Buffer embeds = encoder->empty("prompt_embeds", dims);
  std::unique_ptr<Step> step;
  const double before = encoding.seconds();
  progress.timed(TMD_STAGE_LOAD, [&] { step = encoder->bind(inputs, {{"prompt_embeds", embeds}}); });  // may compile
  encoding = Stopwatch();
  step->run();
  std::vector<float> values = embeds.read<float>(tokens.ids.size() * static_cast<std::size_t>(manifest().text.dim));
  check_finite(TMD_STAGE_TEXT, values.data(), values.size());
  const double seconds = before + encoding.seconds();
  progress.add(TMD_STAGE_TEXT, seconds);
  progress.report(TMD_STAGE_TEXT, done, total, seconds);
  return values;
}

std::vector<float> Pipeline::encode_image(const std::uint8_t* rgb, std::int64_t width, std::int64_t height,
                                          Progress& progress) {
  const std::shared_ptr<LoadedGraph> encoder = graph("encoder", "start from a picture", progress);
  const std::vector<float> found = encode_picture(*encoder, manifest().latents, rgb, width, height, in_tiles(1), progress);
  check_finite(TMD_STAGE_ENCODE, found.data(), found.size());
  release({"encoder"});
  return found;
}

Denoised Pipeline::denoise(const Start& start, std::int64_t tokens, const Settings& settings, Progress& progress) {
  release({"text_encoder"});
  const std::vector<std::int64_t> key = {settings.latent_frames, settings.latent_height, settings.latent_width, tokens};
  std::unique_ptr<Loop> before;
  if (!loop_ || loop_key_ != key) {
    // Of a prompt of another length: holds, until this run is bound, what an engine compiled for the size.
    const bool same_size = loop_ && std::equal(key.begin(), key.end() - 1, loop_key_.begin());
    if (same_size && manifest().family->keeps_prompt_length()) before = std::move(loop_);
    Graphs graphs = {graph("backbone", "denoise", progress), graph("flow_head", "denoise", progress),
                     graph("update", "denoise", progress),
                     [this](bool second, const std::function<void()>& let_go, Progress& now) {
                       return transformer(second, let_go, now);
                     }};
    const Stopwatch load;
    loop_.reset();
    // An engine may compile for the shape here.
    loop_ = family_of(manifest()).make_loop(manifest(), std::move(graphs), settings, tokens);
    loop_key_ = key;
    progress.add(TMD_STAGE_LOAD, load.seconds());
  }
  return loop_->run(start, settings, progress);
}

void Pipeline::decode(const float* latents, std::int64_t frames, std::int64_t height, std::int64_t width,
                      const Decoder::Pieces& pieces, Progress& progress) {
  if (one_after_the_other_) loop_.reset();
  release({"backbone", "flow_head", "backbone_2", "flow_head_2", "update"});
  const std::int64_t stride = manifest().latents.spatial_stride;
  const Tiling rows(height, stride), columns(width, stride);
  const bool whole = !in_tiles(frames) || rows.starts.size() * columns.starts.size() == 1;
  const std::vector<std::int64_t> key = {whole ? height : rows.tile, whole ? width : columns.tile};
  if (!decoder_ || decoder_key_ != key) {
    const auto first = graph("decoder_first", "turn latents into frames", progress);
    const Stopwatch load;
    decoder_.reset();
    decoder_ = std::make_unique<Decoder>(first, manifest().latents, key[0], key[1]);
    decoder_key_ = key;
    progress.add(TMD_STAGE_LOAD, load.seconds());
  }
  check_finite(TMD_STAGE_FLOW_HEAD, latents,
               static_cast<std::size_t>(manifest().latents.channels * frames * height * width));
  const auto load_step = [&] { return graph("decoder_step", "turn latents into more than one frame", progress); };
  if (whole) {
    decoder_->run(latents, frames, load_step, pieces, progress);
  } else {
    decode_tiles(latents, rows, columns, pieces, progress);
  }
  if (one_after_the_other_) decoder_.reset();
  release({"decoder_first", "decoder_step"});
}

void Pipeline::decode_tiles(const float* latents, const Tiling& rows, const Tiling& columns,
                            const Decoder::Pieces& pieces, Progress& progress) {
  const std::int64_t stride = manifest().latents.spatial_stride, channels = manifest().latents.channels;
  const auto total = static_cast<std::int64_t>(rows.starts.size() * columns.starts.size());
  std::vector<float> cut(static_cast<std::size_t>(channels * rows.tile * columns.tile));
  std::vector<std::uint8_t> picture(static_cast<std::size_t>(rows.side * columns.side * stride * stride * 3));
  std::int64_t done = 0;
  const auto make = [&](std::int64_t top, std::int64_t left, std::uint8_t* part) {
    const Stopwatch step;
    for (std::int64_t c = 0; c < channels; ++c)
      for (std::int64_t y = 0; y < rows.tile; ++y)
        std::copy_n(latents + ((c * rows.side) + top + y) * columns.side + left, columns.tile,
                    &cut[static_cast<std::size_t>((c * rows.tile + y) * columns.tile)]);
    Progress silent(nullptr, nullptr, 1);
    const Decoder::Pieces keep = [&](const std::uint8_t* rgb, std::int64_t, std::int64_t) {
      std::copy_n(rgb, rows.tile * columns.tile * stride * stride * 3, part);
    };
    decoder_->run(cut.data(), 1, nullptr, keep, silent);
    progress.add(TMD_STAGE_DECODE, silent.seconds(TMD_STAGE_DECODE));
    progress.report(TMD_STAGE_DECODE, ++done, total, step.seconds());
  };
  join_tiles<std::uint8_t>(rows, columns, stride, 3, picture.data(), make);
  pieces(picture.data(), 0, 1);
}

std::int64_t Pipeline::decode_steps(std::int64_t frames, std::int64_t height, std::int64_t width) const {
  const std::int64_t stride = manifest().latents.spatial_stride;
  if (!in_tiles(frames)) return frames;
  return static_cast<std::int64_t>(Tiling(height, stride).starts.size() * Tiling(width, stride).starts.size());
}

}  // namespace tmd::internal
