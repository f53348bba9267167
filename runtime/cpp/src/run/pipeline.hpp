// Prompt -> frames: the stages of a bundle, put together. One pipeline serves one thread; clones share what is loaded.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "autoencoder/decoder.hpp"
#include "autoencoder/tiles.hpp"
#include "base/log.hpp"
#include "engines/engine.hpp"
#include "run/memory.hpp"
#include "sampling/family.hpp"
#include "text/embedding.hpp"
#include "text/tokenizer.hpp"

namespace tmd::internal {

// What clones share: the bundle, the engine, the tokenizer, and every graph that one of them has loaded.
struct Shared {
  Bundle bundle;
  std::shared_ptr<Engine> engine;
  tmd_memory memory = TMD_MEMORY_AUTO;
  std::string note;         // for the warnings of every run
  std::string system_root;  // where /proc and /sys are; tests put something else there

  std::shared_ptr<const Tokenizer> tokenizer();
  // The graph if somebody holds it, otherwise loaded now; `fresh` tells which.
  std::shared_ptr<LoadedGraph> graph(const std::string& name, const char* purpose, bool* fresh);

 private:
  std::mutex mutex_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::map<std::string, std::weak_ptr<LoadedGraph>> graphs_;
};

// What a run draws: embeddings [tokens, dim], `negative` of the same shape with guidance, else empty; nothing
// of a model of classes.
struct Condition {
  std::vector<float> embeds, negative;
  std::int64_t tokens = 1;
};

class Pipeline {
 public:
  Pipeline(std::shared_ptr<Shared> shared, const Log* log) : shared_(std::move(shared)), log_(log) {}

  const std::shared_ptr<Shared>& shared() const { return shared_; }
  const Manifest& manifest() const { return shared_->bundle.manifest; }

  // Before a run of these stages: decides for TMD_MEMORY_AUTO whether graphs stay loaded, and warns of a run that may
  // not fit at all. Throws Error(MEMORY) for one that surely does not.
  void prepare(const LatentSize& size, Stages stages, std::string& warnings);
  // Before a stage that runs alone, at the manifest's size: throws Error(MEMORY) if it surely takes more than is free.
  void check_one(Stages stage);
  bool one_after_the_other() const { return one_after_the_other_; }

  Tokens tokenize(std::string_view prompt, bool may_be_empty = false) const;
  // Embeddings [tokens, dim] of a prompt, which is one of `expected`. Adds to `warnings`.
  std::vector<float> encode(std::string_view prompt, Progress& progress, std::int64_t expected, std::string& warnings,
                            std::int32_t* dropped);
  // Everything that a run of these settings needs to know of its prompts.
  Condition condition(std::string_view prompt, const Settings& settings, Progress& progress, std::string& warnings,
                      std::int32_t* dropped);
  // How many prompts `condition` encodes.
  std::int64_t prompts(const Settings& settings) const;
  // The empty prompt's embeddings [tokens, dim] beside a prompt of as many; empty if the bundle has none.
  std::vector<float> null_embeds(std::int64_t tokens) const;
  // Latents of a picture, uint8 [height, width, 3], in multiples of the latents' pixels, -> [C, h, w].
  std::vector<float> encode_image(const std::uint8_t* rgb, std::int64_t width, std::int64_t height, Progress& progress);
  Denoised denoise(const Start& start, std::int64_t tokens, const Settings& settings, Progress& progress);
  void decode(const float* latents, std::int64_t frames, std::int64_t height, std::int64_t width,
              const Decoder::Pieces& pieces, Progress& progress);
  // How many steps `decode` reports.
  std::int64_t decode_steps(std::int64_t frames, std::int64_t height, std::int64_t width) const;
  // Gives graphs and buffers back.
  void unload();

 private:
  std::shared_ptr<LoadedGraph> graph(const std::string& name, const char* purpose, Progress& progress);
  const std::vector<float>& encode_negative(const std::string& prompt, Progress& progress, std::int64_t total,
                                            std::string& warnings);
  // Whether the embeddings of the negative prompt lie in the bundle.
  bool is_stored(const Settings& settings) const {
    return settings.negative_prompt.empty() && manifest().text.null_embeds;
  }
  bool in_tiles(std::int64_t frames) const { return manifest().family->makes_stills() && frames == 1; }
  std::vector<float> encode_tokens(const Tokens& tokens, Progress& progress, std::int64_t done, std::int64_t total);
  void decode_tiles(const float* latents, const Tiling& rows, const Tiling& columns, const Decoder::Pieces& pieces,
                    Progress& progress);
  bool chooses() const;  // whether the library decides what stays loaded
  Holding holding() const;  // of this machine's engine
  std::uint64_t free_bytes() const;
  void release(std::initializer_list<const char*> graphs);
  // Backbone and flow head of one of a model's two transformers; where memory is short, in place of the other one.
  Transformer transformer(bool second, const std::function<void()>& let_go, Progress& progress);

  std::shared_ptr<Shared> shared_;
  const Log* log_;
  bool one_after_the_other_ = false;
  std::optional<LatentSize> prepared_;
  Need need_;           // of that size
  Stages checked_ = 0;  // that were compared with what is free
  Stages checked_alone_ = 0;
  std::map<std::string, std::shared_ptr<LoadedGraph>> graphs_;
  struct Negative {
    std::string prompt, warning;
    std::vector<float> embeds;
  };
  std::optional<Negative> negative_;  // the latest negative prompt, which is kept
  // Buffers of the latest shape only: those of two sizes of a large model would not fit side by side.
  std::unique_ptr<Loop> loop_;
  std::vector<std::int64_t> loop_key_;
  std::unique_ptr<Decoder> decoder_;
  std::vector<std::int64_t> decoder_key_;
};

}  // namespace tmd::internal
