#include "text/tokenizer.hpp"

#include <sentencepiece_processor.h>

#include <algorithm>

#include "base/error.hpp"
#include "base/utf8.hpp"
#include "bundle/files.hpp"
#include "text/charsmap.hpp"
#include "text/clean_prompt.hpp"
#include "text/unicode.hpp"

namespace tmd::internal {
namespace {

constexpr const char* kRemedy = " Copy the bundle again, or make it again with tmd-export.";

// Each run of bytes or unknown pieces as one unknown token: the tokenizer of Wan's training fell back to no bytes.
std::vector<int> without_bytes(const sentencepiece::SentencePieceProcessor& processor, const std::vector<int>& ids) {
  const int unknown = processor.unk_id();
  std::vector<int> known;
  for (const int id : ids) {
    const int token = processor.IsByte(id) ? unknown : id;
    if (token != unknown || known.empty() || known.back() != unknown) known.push_back(token);
  }
  return known;
}

// Whether all of UTF-8 `text` is white space.
bool is_blank(const std::string& text) {
  for (const char32_t c : decode_utf8(text))
    if (!is_space(c)) return false;
  return true;
}

}  // namespace

struct Tokenizer::Model {
  sentencepiece::SentencePieceProcessor processor;
};

std::string Tokens::warning(const char* what) const {
  if (!dropped) return "";
  return what + std::string(" is too long: its last ") + std::to_string(dropped) + " of " + std::to_string(kept + dropped) +
         " tokens are ignored. Shorten it.";
}

Tokenizer::Tokenizer(const Bundle& bundle) : text_(bundle.manifest.text) {
  if (!text_.tokenizer)
    fail_run(
        "this bundle has no tokenizer, so it cannot read a prompt. Export it again with text_encoder among --parts.");
  const std::string path = bundle.folder + "/" + *text_.tokenizer;
  const FileInfo& stated = bundle.manifest.files.at(*text_.tokenizer);
  const std::string content = open_regular(bundle.folder, *text_.tokenizer, internal::Links::follow).read_up_to(stated.size + 1, path);
  if (internal::sha256_hex(content) != stated.sha256)
    refuse_bundle(path + " was changed after the bundle was opened." + kRemedy);
  *this = Tokenizer(content, text_, path);
}

Tokenizer::Tokenizer(std::string_view model, const TextInfo& text, const std::string& name)
    : model_(std::make_unique<Model>()), text_(text) {
  if (!has_sound_charsmaps(model) ||
      !model_->processor.LoadFromSerializedProto(absl::string_view(model.data(), model.size())).ok())
    fail_run(name + " is no readable sentencepiece model." + kRemedy);
}

Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokens Tokenizer::operator()(std::string_view prompt, bool may_be_empty) const {
  const bool plain = text_.tokenization == "plain";
  if (plain) check_prompt(prompt);
  const std::string text = plain ? std::string(prompt) : clean_prompt(prompt);
  std::vector<int> ids;
  const sentencepiece::util::Status status =
      model_->processor.Encode(absl::string_view(text.data(), text.size()), &ids);
  if (!status.ok()) fail_run("the tokenizer of this bundle failed. Copy the bundle again, or export it anew.");
  if (!plain) ids = without_bytes(model_->processor, ids);
  if ((ids.empty() || is_blank(text)) && !may_be_empty)
    refuse_usage("the prompt is empty: describe the video in a few words.");
  const auto length = static_cast<std::size_t>(text_.max_length);
  const std::size_t marks = (text_.bos_id ? 1 : 0) + (text_.eos_id ? 1 : 0);
  const std::size_t kept = std::min(ids.size(), length - marks);
  Tokens tokens;
  if (text_.bos_id) tokens.ids.push_back(*text_.bos_id);
  tokens.ids.insert(tokens.ids.end(), ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(kept));
  if (text_.eos_id) tokens.ids.push_back(*text_.eos_id);
  tokens.mask.assign(tokens.ids.size(), 1);
  if (!plain) {
    tokens.ids.resize(length, text_.pad_id);
    tokens.mask.resize(length, 0);
  }
  tokens.kept = static_cast<std::int32_t>(kept);
  tokens.dropped = static_cast<std::int32_t>(ids.size() - kept);
  return tokens;
}

}  // namespace tmd::internal
