#include "bundle/json_fields.hpp"

#include <cmath>

#include "base/ascii.hpp"
#include "base/error.hpp"
#include "base/quote.hpp"
#include "base/utf8.hpp"

namespace tmd::internal {
namespace {

constexpr const char* kRemedy = " Copy the bundle again, or make it again with tmd-export.";
constexpr int kMaxDepth = 32;

bool is_letter(char c) { return is_ascii_letter(static_cast<unsigned char>(c)); }
bool is_digit(char c) { return is_ascii_digit(static_cast<unsigned char>(c)); }

}  // namespace

nlohmann::json read_strict_json(std::string_view data, const std::string& where) {
  const auto fail = [&](const std::string& reason) {
    refuse_bundle(where + " is not valid JSON: " + reason + "." + kRemedy);
  };
  if (data.substr(0, 3) == "\xEF\xBB\xBF") fail("it begins with a byte order mark");  // nlohmann would skip it
  // To nlohmann this is the end, whatever follows.
  if (data.find('\0') != std::string_view::npos) fail("it holds a zero byte");
  // Readers differ in which of two equal keys they take: what one checks, another must not read differently.
  std::vector<std::set<std::string>> keys;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      if (depth >= kMaxDepth) fail("it is nested too deeply");
      if (event == Event::object_start) keys.emplace_back();
    } else if (event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) fail("the key " + quote(key) + " appears twice");
    } else if (event == Event::object_end) {
      keys.pop_back();
    }
    return true;
  };
  try {
    return nlohmann::json::parse(data.begin(), data.end(), watch);
  } catch (const nlohmann::json::exception& error) {
    const std::string reason = quote(error.what(), 200);
    fail(reason.substr(1, reason.size() - 2));
  }
  return {};
}

const nlohmann::json& Field::value() const {
  static const nlohmann::json null;
  return value_ ? *value_ : null;
}

void Field::refuse(const std::string& reason) const {
  std::string found;
  const nlohmann::json& v = value();
  if (v.is_string()) {
    found = " (found " + quote(v.get_ref<const std::string&>()) + ")";
  } else if (v.is_primitive()) {
    found = " (found " + v.dump() + ")";
  }
  refuse_bundle(*where_ + ": " + (place_.empty() ? "manifest" : place_) + ": " + reason + found + "." + kRemedy);
}

std::int64_t Field::integer(std::int64_t low, std::int64_t high) const {
  if (!value().is_number_integer()) refuse("must be a whole number");
  // Above 2^63 nlohmann keeps the number unsigned.
  const bool huge = value().is_number_unsigned() && value().get<std::uint64_t>() > std::uint64_t{1} << 62;
  const std::int64_t number = huge ? 0 : value().get<std::int64_t>();
  if (huge || number < low || number > high)
    refuse("must be from " + std::to_string(low) + " to " + std::to_string(high));
  return number;
}

double Field::number() const {
  if (!value().is_number()) refuse("must be a number");
  const double number = value().get<double>();
  if (!std::isfinite(number)) refuse("must be a finite number");
  return number;
}

double Field::number(double low, double high, bool low_allowed) const {
  const double x = number();
  if (x < low || x > high || (!low_allowed && x == low)) {
    const std::string from = nlohmann::json(low).dump(), to = nlohmann::json(high).dump();
    refuse((low_allowed ? "must be from " : "must be above ") + from + (low_allowed ? " to " : " and at most ") + to);
  }
  return x;
}

bool Field::boolean() const {
  if (!value().is_boolean()) refuse("must be true or false");
  return value().get<bool>();
}

std::string Field::string() const {
  if (!value().is_string()) refuse("must be a string");
  return value().get<std::string>();
}

std::string Field::text() const {
  const std::string content = string();
  std::size_t characters = 0;
  for (const char32_t c : decode_utf8(content)) {
    ++characters;
    if (c < 0x20 || (c >= 0x7f && c <= 0x9f)) refuse("must not hold control characters");
  }
  if (characters < 1 || characters > 1024) refuse("must have 1 to 1024 characters");
  return content;
}

std::string Field::identifier() const {
  const std::string name = string();
  bool good = !name.empty() && name.size() <= 64 && (is_letter(name[0]) || name[0] == '_');
  for (const char c : name) good = good && (is_letter(c) || is_digit(c) || c == '_' || c == '.');
  if (!good) refuse("must be a name of letters, digits, '_' and '.', at most 64");
  return name;
}

std::string Field::file_name() const {
  const std::string name = string();
  if (name.find_first_of("/\\") != std::string::npos)
    refuse("a file name must be a plain name, without folders (no separator, no '..', not absolute)");
  if (name == "manifest.json") refuse("the manifest cannot list itself");
  bool good = !name.empty() && name.size() <= 128 && (is_letter(name[0]) || is_digit(name[0]) || name[0] == '_');
  for (const char c : name) good = good && (is_letter(c) || is_digit(c) || c == '.' || c == '_' || c == '-');
  if (!good)
    refuse("a file name may hold letters, digits, '.', '_' and '-', at most 128, and not start with '.' or '-'");
  return name;
}

std::string Field::sha256() const {
  const std::string hex = string();
  bool good = hex.size() == 64;
  for (const char c : hex) good = good && (is_digit(c) || (c >= 'a' && c <= 'f'));
  if (!good) refuse("must be 64 lower-case hex digits");
  return hex;
}

std::string Field::one_of(std::initializer_list<const char*> words) const {
  const std::string word = string();
  std::string known;
  for (const char* allowed : words) {
    if (word == allowed) return word;
    known += (known.empty() ? "" : ", ") + std::string(allowed);
  }
  refuse("must be one of " + known);
}

std::vector<Field> Field::list(std::size_t low, std::size_t high) const {
  if (!value().is_array()) refuse("must be a list");
  const std::size_t count = value().size();
  if (count < low) refuse("must have at least " + std::to_string(low) + " items");
  if (count > high) refuse("must have at most " + std::to_string(high) + " items, not " + std::to_string(count));
  std::vector<Field> items;
  items.reserve(count);
  for (std::size_t i = 0; i < count; ++i)
    items.emplace_back(&value()[i], place_ + "[" + std::to_string(i) + "]", where_);
  return items;
}

void Field::entries(std::size_t low, std::size_t high,
                    const std::function<void(const Field&, const Field&)>& entry) const {
  if (!value().is_object()) refuse("must be an object");
  const std::size_t count = value().size();
  if (count < low) refuse("must have at least " + std::to_string(low) + " entries");
  if (count > high) refuse("must have at most " + std::to_string(high) + " entries, not " + std::to_string(count));
  for (auto item = value().begin(); item != value().end(); ++item) {
    const nlohmann::json key(item.key());
    const std::string shown = quote(item.key(), 64);
    const std::string place = place_ + "." + shown.substr(1, shown.size() - 2);
    entry(Field(&key, place, where_), Field(&item.value(), place, where_));
  }
}

Object::Object(const Field& field) : field_(field) {
  if (!field.value().is_object()) field.refuse("must be an object");
}

std::string Object::place_of(const std::string& name) const {
  return field_.place().empty() ? name : field_.place() + "." + name;
}

Field Object::maybe(const char* name) {
  known_.insert(name);
  const auto found = field_.value().find(name);
  return {found == field_.value().end() ? nullptr : &*found, place_of(name), &field_.where()};
}

Field Object::need(const char* name) {
  if (!field_.value().contains(name)) Field(nullptr, place_of(name), &field_.where()).refuse("is missing");
  return maybe(name);
}

void Object::done() const {
  for (auto item = field_.value().begin(); item != field_.value().end(); ++item) {
    if (known_.count(item.key())) continue;
    const std::string shown = quote(item.key(), 64);
    Field(&item.value(), place_of(shown.substr(1, shown.size() - 2)), &field_.where())
        .refuse("is no field of a manifest");
  }
}

}  // namespace tmd::internal
