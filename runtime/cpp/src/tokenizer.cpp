#include "tokenizer.hpp"

#include <sentencepiece_processor.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>

#include "clean_prompt.hpp"
#include "error.hpp"
#include "files.hpp"
#include "unicode.hpp"
#include "utf8.hpp"

namespace tmd::internal {
namespace {

constexpr const char* kRemedy = " Copy the bundle again, or make it again with tmd-export.";

float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
  std::uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3FF, bits;
  if (exponent == 31) {
    bits = sign | 0x7F800000u | mantissa << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {  // subnormal: mantissa * 2^-24, exact in float
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float stored_to_float(const char* at, DType dtype) {
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::uint16_t half;
  std::memcpy(&half, at, sizeof half);
  if (dtype == DType::f16) return half_to_float(half);
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;  // bfloat16 is the upper half of a float
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the embedding table is little-endian, and so must this machine be"
#endif

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

std::string Tokens::warning() const {
  if (!dropped) return "";
  return "the prompt is too long: its last " + std::to_string(dropped) + " of " + std::to_string(kept + dropped) +
         " tokens are ignored. Shorten it.";
}

Tokenizer::Tokenizer(const Bundle& bundle) : text_(bundle.manifest.text) {
  if (!text_.tokenizer)
    fail_run(
        "this bundle has no tokenizer, so it cannot read a prompt. Export it again with text_encoder among --parts.");
  const std::string path = bundle.folder + "/" + *text_.tokenizer;
  const FileInfo& stated = bundle.manifest.files.at(*text_.tokenizer);
  const std::string content = open_regular(bundle.folder, *text_.tokenizer).read_up_to(stated.size + 1, path);
  if (internal::sha256_hex(content) != stated.sha256)
    refuse_bundle(path + " was changed after the bundle was opened." + kRemedy);
  *this = Tokenizer(content, text_, path);
}

Tokenizer::Tokenizer(std::string_view model, const TextInfo& text, const std::string& name)
    : model_(std::make_unique<Model>()), text_(text) {
  const sentencepiece::util::Status status =
      model_->processor.LoadFromSerializedProto(absl::string_view(model.data(), model.size()));
  if (!status.ok()) fail_run(name + " is no readable sentencepiece model." + kRemedy);
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

std::vector<float> read_rows(const Bundle& bundle, const EmbeddingTable& table, const std::vector<std::int64_t>& ids) {
  const std::string path = bundle.folder + "/" + table.file;
  const auto dim = static_cast<std::size_t>(table.dim), item = item_size(table.dtype), row_bytes = dim * item;
  const File file = open_regular(bundle.folder, table.file);
  if (file.size() != bundle.manifest.files.at(table.file).size)
    fail_run(path + " was changed after the bundle was opened." + kRemedy);
  std::map<std::int64_t, std::size_t> seen;  // id -> the row of the result that has it already: pads repeat
  std::vector<float> embeds(ids.size() * dim);
  std::vector<char> row(row_bytes);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const std::int64_t id = ids[i];
    if (id < 0 || id >= table.rows)
      fail_run("the tokenizer gave the id " + std::to_string(id) + ", and " + table.file + " has rows 0 to " +
               std::to_string(table.rows - 1) + ": they do not belong together. Export the bundle again.");
    float* to = &embeds[i * dim];
    if (const auto [before, fresh] = seen.emplace(id, i); !fresh) {
      std::copy_n(&embeds[before->second * dim], dim, to);
      continue;
    }
    std::size_t done = 0;
    while (done < row_bytes) {
      const auto offset = static_cast<off_t>(static_cast<std::size_t>(id) * row_bytes + done);
      const ssize_t got = ::pread(file.descriptor(), &row[done], row_bytes - done, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) fail_run(path + " ends early." + kRemedy);
      done += static_cast<std::size_t>(got);
    }
    for (std::size_t k = 0; k < dim; ++k) to[k] = stored_to_float(&row[k * item], table.dtype);
  }
  return embeds;
}

}  // namespace tmd::internal
