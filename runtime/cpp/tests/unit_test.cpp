// What can be held to golden values, published vectors and closed forms without Python. The comparison with Python,
// case by case, is in tests/unit/cpp at the top of the repository.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#include "base/error.hpp"
#include "base/utf8.hpp"
#include "bundle/files.hpp"
#include "bundle/json_fields.hpp"
#include "engines/buffer.hpp"
#include "sampling/noise.hpp"
#include "sampling/rules.hpp"
#include "sampling/schedule.hpp"
#include "text/clean_prompt.hpp"
#include "text/mojibake.hpp"

using namespace tmd::internal;

namespace {

template <typename Work>
tmd_status status_of(const Work& work) {
  try {
    work();
  } catch (const Error& error) {
    CHECK(std::string(error.what()).find('\n') == std::string::npos);
    return error.status();
  }
  return TMD_OK;
}

std::uint32_t bits(float value) {
  std::uint32_t out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

}  // namespace

TEST_CASE("noise has the golden bits that Python has") {
  std::ifstream file(TMD_GOLDEN_NOISE);
  REQUIRE(file);
  std::stringstream words;
  for (std::string line; std::getline(file, line);) words << line.substr(0, line.find('#')) << '\n';
  NoiseStream stream(0);
  int draws = 0;
  for (std::string command; words >> command;) {
    if (command == "stream") {
      std::uint64_t seed;
      words >> seed;
      stream = NoiseStream(seed);
      continue;
    }
    std::size_t count;
    words >> count;
    std::vector<float> values(count);
    stream.normal(values.data(), count);
    ++draws;
    std::string expected;
    if (command == "draw") {
      for (const float value : values) {
        words >> expected;
        REQUIRE(bits(value) == std::stoul(expected, nullptr, 16));
      }
    } else {
      REQUIRE(command == "hash");
      std::uint64_t hash = 0xCBF29CE484222325;
      for (const float value : values)
        for (int shift = 0; shift < 32; shift += 8) hash = (hash ^ (bits(value) >> shift & 0xFF)) * 0x100000001B3;
      words >> expected;
      REQUIRE(hash == std::stoull(expected, nullptr, 16));
    }
  }
  CHECK(draws == 22);
}

TEST_CASE("the generator is the MT19937 of the C++ standard") {
  MersenneTwister words(5489);  // the 10000th word of the default seed is in the standard
  std::uint32_t word = 0;
  for (int i = 0; i < 10000; ++i) word = words.next();
  CHECK(word == 4123659995u);
}

TEST_CASE("logarithm, sine and cosine are as good as they say") {
  for (double x = 1e-3; x < 1; x += 1.7e-3)
    CHECK(std::fabs(exact_log(x) - std::log(x)) <= 3e-16 * std::fabs(std::log(x)) + 1e-16);
  for (double angle = 0; angle < 6.2832; angle += 1.3e-3) {
    double sine, cosine;
    exact_sin_cos(angle, &sine, &cosine);
    CHECK(std::fabs(sine - std::sin(angle)) < 1e-15);
    CHECK(std::fabs(cosine - std::cos(angle)) < 1e-15);
  }
}

TEST_CASE("sha256 of the published vectors") {
  CHECK(sha256_hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256_hex("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256_hex(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("UTF-8 is taken by the letter") {
  const std::string good = "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\xA5";
  CHECK(is_utf8(good));
  CHECK(encode_utf8(decode_utf8(good)) == good);
  for (const char* bad :
       {"\x80", "\xC3", "\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xE2\x82"})
    CHECK_FALSE(is_utf8(bad));
}

TEST_CASE("prompts are cleaned") {
  CHECK(clean_prompt("  a \t red\r\n circle\xE3\x80\x80\x00 ") == "a red circle");
  CHECK(clean_prompt("Tom &amp;amp; Jerry &lt;3") == "Tom & Jerry <3");
  CHECK(clean_prompt("\xE2\x80\x9Cquotes\xE2\x80\x9D \xEF\xAC\x81ne \xEF\xBC\xA1") == "\"quotes\" fine A");
  CHECK(clean_prompt("cafe\xCC\x81") == "caf\xC3\xA9");
  CHECK(clean_prompt("") == "");
  CHECK(status_of([] { clean_prompt("\xFF"); }) == TMD_ERROR_USAGE);
  CHECK(status_of([] { clean_prompt("caf\xC3\x83\xC2\xA9"); }) == TMD_ERROR_USAGE);
  CHECK(status_of([] { clean_prompt(std::string(1000001, 'a')); }) == TMD_ERROR_USAGE);
  CHECK_FALSE(
      looks_wrongly_decoded(decode_utf8("ein gr\xC3\xBCner K\xC3\xA4"
                                        "fer")));
}

TEST_CASE("JSON is strict") {
  const auto read = [](const std::string& text) { return status_of([&] { read_strict_json(text, "file"); }); };
  CHECK(read(R"({"a": [1, 2.5, "x", null, true], "b": {"a": 1}})") == TMD_OK);
  for (const char* bad : {"", "{", "\xEF\xBB\xBF{}", R"({"a": 1, "a": 2})", R"({"a": {"b": 1, "\u0062": 2}})", "[NaN]",
                          "[1e999]", "{} {}", "[\"\xFF\"]", "[\"\\ud800\"]", "[01]", "/**/ {}"})
    CHECK(read(bad) == TMD_ERROR_BUNDLE);
  CHECK(read(std::string("{}\0 more", 8)) == TMD_ERROR_BUNDLE);
  CHECK(read(std::string("{}\0", 3)) == TMD_ERROR_BUNDLE);
  CHECK(read(std::string(100000, '[')) == TMD_ERROR_BUNDLE);
  CHECK(read(std::string(31, '[') + std::string(31, ']')) == TMD_OK);
  CHECK(read(std::string(33, '[') + std::string(33, ']')) == TMD_ERROR_BUNDLE);
}

TEST_CASE("time grids have their ends") {
  const std::vector<double> grid = shift_grid(4, 5.0, 0.999);
  CHECK(grid.front() == 0.0);
  CHECK(grid.back() == 0.999);
  CHECK(grid[1] == 5.0 * 0.25 / (4.0 * 0.25 + 1.0));
  CHECK(status_of([] { shift_grid(1000, 1000.0, 0.999); }) == TMD_ERROR_RUN);
  CHECK(wan_grid(2, 1.0) == std::vector<double>{0.999, 0.4995, 0.0});
  CHECK(told_time(0.98765, "bfloat16") == 0.988);
  CHECK(told_time(0.9876, "integer") == 0.987);
}

TEST_CASE("a buffer takes and gives exactly what it holds") {
  const Buffer buffer(DType::f32, {2, 3}), same(DType::f32, {6}), other(DType::f32, {5}), bytes(DType::u8, {24});
  const float values[6] = {1, 2, 3, 4, 5, 6};
  buffer.write(values, 6);
  CHECK(buffer.read<float>(6) == std::vector<float>(values, values + 6));
  same.copy(buffer);
  CHECK(same.read<float>(6) == buffer.read<float>(6));
  buffer.write(values, 3, 2);
  CHECK(buffer.read<float>(6) == std::vector<float>{1, 2, 3, 1, 2, 3});
  for (const std::size_t count : {std::size_t{0}, std::size_t{5}, std::size_t{7}, SIZE_MAX}) {
    CHECK(status_of([&] { buffer.write(values, count); }) == TMD_ERROR_RUN);
    CHECK(status_of([&] { buffer.read<float>(count); }) == TMD_ERROR_RUN);
  }
  CHECK(status_of([&] { buffer.write(values, 6, 2); }) == TMD_ERROR_RUN);
  CHECK(status_of([&] { buffer.values<std::int64_t>(6); }) == TMD_ERROR_RUN);
  CHECK(status_of([&] { buffer.copy(other); }) == TMD_ERROR_RUN);
  CHECK(status_of([&] { buffer.copy(bytes); }) == TMD_ERROR_RUN);  // as many bytes, of another type
  CHECK(status_of([&] { bytes.fill(0); }) == TMD_ERROR_RUN);
}

TEST_CASE("rules return the predicted data in their last step") {
  for (const char* name : {"renoise", "unipc"}) {
    const Coefficients last = find_rule(name)({1.0, 0.6, 0.3, 0.0}, 2);
    CHECK(last.noise == 0);
    if (name == std::string("renoise")) CHECK((last.x == 1 && last.velocity == -0.3));
  }
  const Coefficients step = find_rule("euler")({1.0, 0.6, 0.0}, 0);
  CHECK((step.x == 1 && step.velocity == 0.6 - 1.0 && step.noise == 0 && step.before_1 == 0));
  CHECK(!find_rule("magic"));
}
