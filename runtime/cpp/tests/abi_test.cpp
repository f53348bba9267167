// The C++ header compiles alone, and its owners behave: move-only, errors thrown or returned by choice.
#include <tmd/tmd.hpp>

#include <cstdio>
#include <type_traits>

static_assert(!std::is_copy_constructible_v<tmd::Context> && !std::is_copy_assignable_v<tmd::Context>);
static_assert(std::is_nothrow_move_constructible_v<tmd::Context> && std::is_nothrow_move_assignable_v<tmd::Context>);

#define CHECK(condition)                                         \
  if (!(condition)) {                                            \
    std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
    return 1;                                                    \
  }

int main() {
  tmd::Context context;
  CHECK(context.try_open("/no/such/bundle") == TMD_ERROR_BUNDLE);
  CHECK(context.error().find("/no/such/bundle") != std::string::npos);
  CHECK(context.try_generate("a prompt").status == TMD_ERROR_USAGE);
  CHECK(!context.try_describe());
  bool thrown = false;
  try {
    context.open("/no/such/bundle");
  } catch (const tmd::Error& error) {
    thrown = error.status() == TMD_ERROR_BUNDLE;
  }
  CHECK(thrown);
  tmd::Context moved = std::move(context);
  CHECK(moved.get() && !context.get());
  CHECK(context.try_open("/no/such/bundle") == TMD_ERROR_USAGE);  // an empty owner is no crash
  return 0;
}
