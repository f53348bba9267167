// Strict reading of JSON into checked values: every rule of a field in one call, every message with its place.
//
// Not a schema language: a cursor over nlohmann's document that converts nothing (2.0 and true are not the integer 2)
// and knows which fields of an object nobody has read.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace tmd::internal {

// The document in `data`: UTF-8 without byte order mark, no key twice, no NaN, not deeper than any manifest is.
// Throws Error(BUNDLE) beginning with `where`.
nlohmann::json read_strict_json(std::string_view data, const std::string& where);

// A value and its place. Every method throws Error(BUNDLE) that names the place.
class Field {
 public:
  Field(const nlohmann::json* value, std::string place, const std::string* where)
      : value_(value), place_(std::move(place)), where_(where) {}

  bool present() const { return value_ != nullptr; }
  bool is_null() const { return !present() || value_->is_null(); }
  std::int64_t integer(std::int64_t low, std::int64_t high) const;
  double number(double low, double high, bool low_allowed = true) const;
  double number() const;  // any finite one
  bool boolean() const;
  std::string string() const;
  std::string text() const;        // 1 to 1024 characters, none of them a control character
  std::string identifier() const;  // a letter or _, then letters, digits, _ or .
  std::string file_name() const;
  std::string sha256() const;
  std::string one_of(std::initializer_list<const char*> words) const;
  std::vector<Field> list(std::size_t low, std::size_t high) const;
  // Calls `entry` with each key as a field of its own (for its rules) and its value.
  void entries(std::size_t low, std::size_t high, const std::function<void(const Field&, const Field&)>& entry) const;

  const nlohmann::json& value() const;
  const std::string& place() const { return place_; }
  const std::string& where() const { return *where_; }
  [[noreturn]] void refuse(const std::string& reason) const;

 private:
  const nlohmann::json* value_;
  std::string place_;
  const std::string* where_;
};

// An object whose fields are all known: `done` refuses those that neither `need` nor `maybe` was called for.
class Object {
 public:
  explicit Object(const Field& field);
  Field need(const char* name);   // missing: refused
  Field maybe(const char* name);  // missing: null
  void done() const;
  [[noreturn]] void refuse(const std::string& reason) const { field_.refuse(reason); }

 private:
  std::string place_of(const std::string& name) const;
  Field field_;
  std::set<std::string> known_;
};

}  // namespace tmd::internal
