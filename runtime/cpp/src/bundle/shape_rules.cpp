// The shapes that each operator gives, as ONNX defines them.
#include <algorithm>
#include <numeric>
#include <set>

#include "bundle/shape_walk.hpp"

namespace tmd::internal {
namespace {

Shape broadcast(const Shape& one, const Shape& other) {
  Shape out(std::max(one.size(), other.size()), 1);
  for (std::size_t back = 1; back <= out.size(); ++back) {
    const std::int64_t a = back <= one.size() ? one[one.size() - back] : 1;
    const std::int64_t b = back <= other.size() ? other[other.size() - back] : 1;
    if (a != b && a != 1 && b != 1) throw Unsizable{"its inputs do not fit together"};
    out[out.size() - back] = a == 1 ? b : a;
  }
  return out;
}

std::int64_t product(std::int64_t a, std::int64_t b) {
  std::int64_t out;
  if (__builtin_mul_overflow(a, b, &out)) throw Unsizable{"a size is out of range"};
  return checked(out);
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b > 0); }

}  // namespace

std::vector<ShapedTensor> Walk::together() const {
  Shape out = shape(0);
  for (std::size_t i = 1; i < node_->inputs.size(); ++i) out = broadcast(out, shape(i));
  return one(out);
}

std::vector<ShapedTensor> Walk::attention() const {
  Shape out = shape(0);
  const Shape& values = shape(2);
  if (out.size() != values.size() || (out.size() != 3 && out.size() != 4)) throw Unsizable{"its inputs do not fit"};
  if (out.size() == 4) {
    out[3] = values[3];
  } else {
    const std::int64_t heads = node_->number("q_num_heads", 0), shared = node_->number("kv_num_heads", 0);
    if (heads < 1 || shared < 1) throw Unsizable{"it has no heads"};
    out[2] = product(values[2] / shared, heads);
  }
  return one(out);
}

std::vector<ShapedTensor> Walk::concat() const {
  Shape out = shape(0);
  const std::size_t axis = axis_of(node_->number("axis", 0), out.size());
  for (std::size_t i = 1; i < node_->inputs.size(); ++i) {
    Shape next = shape(i);
    if (next.size() != out.size()) throw Unsizable{"its inputs do not fit together"};
    out[axis] = checked(out[axis] + next[axis]);
  }
  return one(out);
}

std::vector<ShapedTensor> Walk::windows(bool transposed) const {
  Shape out = shape(0);
  const Shape& weight = shape(1);
  if (out.size() < 3 || weight.size() != out.size()) throw Unsizable{"its inputs do not fit together"};
  const std::size_t sides = out.size() - 2;
  const auto numbers = [&](const char* name, std::size_t count, std::int64_t otherwise) {
    Shape found = node_->numbers(name);
    if (found.empty()) found.assign(count, otherwise);
    if (found.size() != count) throw Unsizable{std::string("its ") + name + " do not fit"};
    for (const std::int64_t each : found)
      if (each < 0 || each > kMaxSize) throw Unsizable{std::string("its ") + name + " are out of range"};
    return found;
  };
  const Shape strides = numbers("strides", sides, 1), dilations = numbers("dilations", sides, 1);
  const Shape pads = numbers("pads", 2 * sides, 0);
  const std::string_view padding = node_->word("auto_pad");
  const bool is_same = padding == "SAME_UPPER" || padding == "SAME_LOWER";
  out[1] = transposed ? product(weight[1], std::max<std::int64_t>(1, node_->number("group", 1))) : weight[0];
  for (std::size_t i = 0; i < sides; ++i) {
    std::int64_t& size = out[i + 2];
    if (!strides[i]) throw Unsizable{"a stride of it is 0"};
    const std::int64_t reach = product(checked(weight[i + 2] - 1), dilations[i]) + 1;
    const std::int64_t padded = pads[i] + pads[i + sides];
    if (is_same)
      size = transposed ? product(size, strides[i]) : ceil_div(size, strides[i]);
    else if (transposed)
      size = checked(product(strides[i], checked(size - 1)) + reach - padded);
    else
      size = checked(size + padded - reach) / strides[i] + 1;
  }
  return one(out);
}

std::vector<ShapedTensor> Walk::quantize() const {
  const std::int64_t stated = node_->number("output_dtype", 0);
  return {{stated ? stated : has(2) ? in(2).type : kUint8, shape(0)}};
}

std::vector<ShapedTensor> Walk::dequantize() const {
  const std::int64_t stated = node_->number("output_dtype", 0);
  return {{stated ? stated : in(1).type, shape(0)}};
}

std::vector<ShapedTensor> Walk::expand() const {
  Shape to = value(1);
  for (const std::int64_t size : to) checked(size);
  return one(broadcast(shape(0), to));
}

std::vector<ShapedTensor> Walk::gather() const {
  const Shape &data = shape(0), &places = shape(1);
  const std::size_t axis = axis_of(node_->number("axis", 0), data.size());
  Shape out(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(axis));
  out.insert(out.end(), places.begin(), places.end());
  out.insert(out.end(), data.begin() + static_cast<std::ptrdiff_t>(axis) + 1, data.end());
  return one(out);
}

std::vector<ShapedTensor> Walk::gemm() const {
  const Shape &a = shape(0), &b = shape(1);
  if (a.size() != 2 || b.size() != 2) throw Unsizable{"its inputs are no matrices"};
  return one({a[node_->number("transA", 0) ? 1 : 0], b[node_->number("transB", 0) ? 0 : 1]});
}

std::vector<ShapedTensor> Walk::matmul() const {
  Shape a = shape(0), b = shape(1);
  if (a.empty() || b.empty()) throw Unsizable{"its inputs are no matrices"};
  const bool row = a.size() == 1, column = b.size() == 1;
  if (row) a.insert(a.begin(), 1);
  if (column) b.push_back(1);
  if (a.back() != b[b.size() - 2]) throw Unsizable{"its inputs do not fit together"};
  Shape out = broadcast(Shape(a.begin(), a.end() - 2), Shape(b.begin(), b.end() - 2));
  if (!row) out.push_back(a[a.size() - 2]);
  if (!column) out.push_back(b.back());
  return one(out);
}

std::vector<ShapedTensor> Walk::pad() const {
  Shape out = shape(0);
  const std::vector<std::int64_t>& by = value(1);
  std::vector<std::int64_t> axes(out.size());
  std::iota(axes.begin(), axes.end(), 0);
  if (has(3)) axes = value(3);
  if (by.size() != 2 * axes.size()) throw Unsizable{"its pads do not fit"};
  for (std::size_t i = 0; i < axes.size(); ++i) {
    std::int64_t& size = out[axis_of(axes[i], out.size())];
    for (const std::int64_t each : {by[i], by[i + axes.size()]})
      if (each < -kMaxSize || each > kMaxSize) throw Unsizable{"its pads are out of range"};
    size = checked(size + by[i] + by[i + axes.size()]);
  }
  return one(out);
}

std::vector<ShapedTensor> Walk::range() const {
  for (std::size_t i = 0; i < 3; ++i)
    if (value(i).size() != 1) throw Unsizable{"its limits are no numbers"};
  const std::int64_t start = value(0)[0], limit = value(1)[0], step = value(2)[0];
  for (const std::int64_t each : {start, limit, step})
    if (each < -kMaxSize || each > kMaxSize) throw Unsizable{"its limits are out of range"};
  if (!step) throw Unsizable{"its step is 0"};
  const std::int64_t way = step > 0 ? limit - start : start - limit;
  return one({way > 0 ? ceil_div(way, step > 0 ? step : -step) : 0});
}

std::vector<ShapedTensor> Walk::reduce() const {
  const Shape& from = shape(0);
  std::set<std::size_t> gone;
  if (has(1)) {
    for (const std::int64_t axis : value(1)) gone.insert(axis_of(axis, from.size()));
    if (value(1).empty() && node_->number("noop_with_empty_axes", 0)) return one(from);
  } else if (node_->number("noop_with_empty_axes", 0)) {
    return one(from);
  }
  Shape out;
  for (std::size_t i = 0; i < from.size(); ++i) {
    const bool reduced = gone.empty() || gone.count(i);
    if (!reduced) out.push_back(from[i]);
    if (reduced && node_->number("keepdims", 1)) out.push_back(1);
  }
  return one(out);
}

std::vector<ShapedTensor> Walk::reshape() const {
  const Shape& from = shape(0);
  Shape out = value(1);
  std::uint64_t known = 1;
  std::optional<std::size_t> open;
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (out[i] == 0 && !node_->number("allowzero", 0)) {
      if (i >= from.size()) throw Unsizable{"its shape does not fit"};
      out[i] = from[i];
    }
    if (out[i] == -1 && !open) {
      open = i;
      continue;
    }
    if (__builtin_mul_overflow(known, static_cast<std::uint64_t>(checked(out[i])), &known))
      throw Unsizable{"its shape is out of range"};
  }
  const std::uint64_t whole = in(0).elements();
  if (open) {
    if (!known || whole % known) throw Unsizable{"its shape does not fit"};
    out[*open] = static_cast<std::int64_t>(whole / known);
  } else if (whole != known) {
    throw Unsizable{"its shape does not fit"};
  }
  return one(out);
}

Shape Walk::part_of_shape() const {
  const Shape& from = shape(0);
  const auto rank = static_cast<std::int64_t>(from.size());
  const auto place = [&](std::int64_t at) {
    return std::clamp(at < 0 ? at + rank : at, std::int64_t{0}, rank);
  };
  const std::int64_t start = place(node_->number("start", 0)), end = place(node_->number("end", rank));
  return start < end ? Shape(from.begin() + start, from.begin() + end) : Shape();
}

std::vector<ShapedTensor> Walk::shape_of() const {
  return {{kInt64, {static_cast<std::int64_t>(part_of_shape().size())}}};
}

std::vector<Walk::Cut> Walk::cuts() const {
  const Shape& from = shape(0);
  const std::vector<std::int64_t>&starts = value(1), &ends = value(2);
  std::vector<std::int64_t> axes(starts.size()), steps(starts.size(), 1);
  std::iota(axes.begin(), axes.end(), 0);
  if (has(3)) axes = value(3);
  if (has(4)) steps = value(4);
  if (ends.size() != starts.size() || axes.size() != starts.size() || steps.size() != starts.size())
    throw Unsizable{"its ends do not fit"};
  std::vector<Cut> found;
  for (std::size_t i = 0; i < starts.size(); ++i) {
    const std::size_t axis = axis_of(axes[i], from.size());
    const std::int64_t size = from[axis], step = steps[i];
    if (!step || step > kMaxSize || step < -kMaxSize) throw Unsizable{"its step is out of range"};
    const std::int64_t low = step > 0 ? 0 : -1, high = step > 0 ? size : size - 1;
    const auto place = [&](std::int64_t at) { return std::clamp(at < 0 ? at + size : at, low, high); };
    const std::int64_t start = place(starts[i]), end = place(ends[i]);
    const std::int64_t way = step > 0 ? end - start : start - end;
    found.push_back({axis, start, way > 0 ? ceil_div(way, step > 0 ? step : -step) : 0, step});
  }
  return found;
}

std::vector<ShapedTensor> Walk::slice() const {
  Shape out = shape(0);
  for (const Cut& cut : cuts()) out[cut.axis] = cut.count;
  return one(out);
}

std::vector<ShapedTensor> Walk::split() const {
  const Shape& from = shape(0);
  const std::size_t axis = axis_of(node_->number("axis", 0), from.size());
  std::vector<std::int64_t> parts;
  if (has(1)) {
    parts = value(1);
  } else {
    const auto count = static_cast<std::int64_t>(node_->outputs.size());
    const std::int64_t size = ceil_div(from[axis], count);
    for (std::int64_t i = 0; i < count; ++i)
      parts.push_back(std::max<std::int64_t>(0, std::min(size, from[axis] - i * size)));
  }
  std::vector<ShapedTensor> out;
  for (const std::int64_t part : parts) {
    out.push_back(in(0));
    out.back().shape[axis] = checked(part);
  }
  if (out.empty()) throw Unsizable{"it has no parts"};
  return out;
}

std::vector<ShapedTensor> Walk::squeeze() const {
  const Shape& from = shape(0);
  std::set<std::size_t> gone;
  if (has(1)) {
    for (const std::int64_t axis : value(1)) gone.insert(axis_of(axis, from.size()));
  } else {
    for (std::size_t i = 0; i < from.size(); ++i)
      if (from[i] == 1) gone.insert(i);
  }
  Shape out;
  for (std::size_t i = 0; i < from.size(); ++i) {
    if (!gone.count(i)) out.push_back(from[i]);
    else if (from[i] != 1) throw Unsizable{"a size that it takes away is not 1"};
  }
  return one(out);
}

std::vector<ShapedTensor> Walk::unsqueeze() const {
  const Shape& from = shape(0);
  std::set<std::size_t> added;
  for (const std::int64_t axis : value(1)) added.insert(axis_of(axis, from.size() + value(1).size()));
  Shape out;
  auto next = from.begin();
  for (std::size_t i = 0; i < from.size() + added.size(); ++i)
    out.push_back(added.count(i) || next == from.end() ? 1 : *next++);
  return one(out);
}

std::vector<ShapedTensor> Walk::transpose() const {
  const Shape& from = shape(0);
  Shape order = node_->numbers("perm"), out;
  if (order.empty())
    for (std::size_t i = from.size(); i-- > 0;) order.push_back(static_cast<std::int64_t>(i));
  if (order.size() != from.size()) throw Unsizable{"its order does not fit"};
  for (const std::int64_t axis : order) out.push_back(from[axis_of(axis, from.size())]);
  return one(out);
}

}  // namespace tmd::internal
