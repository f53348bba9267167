// Prompt text -> token ids, as Wan's UMT5 saw them in training; and token ids -> rows of an embedding table.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bundle.hpp"

namespace tmd::internal {

struct Tokens {
  std::vector<std::int64_t> ids, mask;  // [max_length]
  std::int32_t dropped = 0;             // tokens that did not fit

  // What the user should know about this prompt, in one sentence, or "".
  std::string warning() const;
};

// The sentencepiece model of a bundle. Its methods may be called by several threads.
class Tokenizer {
 public:
  // Throws Error(RUN) for any other file.
  explicit Tokenizer(const Bundle& bundle);
  // From the bytes of a model; `name` is for messages.
  Tokenizer(std::string_view model, const TextInfo& text, const std::string& name);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();
  // Cleaned and tokenized; throws Error(USAGE) if nothing is left (unless it may be), or if clean_prompt refuses.
  Tokens operator()(std::string_view prompt, bool may_be_empty = false) const;

 private:
  struct Model;
  std::unique_ptr<Model> model_;
  TextInfo text_;
};

// `token_embeds` [ids, dim] float32 from the bundle's table, read row by row and not mapped: a row is a few kilobytes
// of a file of gigabytes. Throws Error(RUN) for an id without a row or a file that was changed.
std::vector<float> embed_tokens(const Bundle& bundle, const std::vector<std::int64_t>& ids);

}  // namespace tmd::internal
