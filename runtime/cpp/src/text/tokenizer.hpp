// Prompt text -> token ids, as the bundle's text encoder saw them in training.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bundle/reader.hpp"

namespace tmd::internal {

struct Tokens {
  std::vector<std::int64_t> ids, mask;  // [max_length]; of tokenization "plain" as many as there are
  std::int32_t kept = 0, dropped = 0;   // tokens of the text that are among them, and that did not fit

  // What the user should know about this prompt, in one sentence, or "". `what` it is called.
  std::string warning(const char* what = "the prompt") const;
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
  // Throws Error(USAGE) if there is no text (unless that may be), if it is not UTF-8, or if clean_prompt refuses it.
  Tokens operator()(std::string_view prompt, bool may_be_empty = false) const;

 private:
  struct Model;
  std::unique_ptr<Model> model_;
  TextInfo text_;
};

}  // namespace tmd::internal
