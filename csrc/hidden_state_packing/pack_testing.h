// For the tests of both kernels: calls with all their memory, and what they should leave behind.
//
// The definition knows a format by its numbers of exponent and mantissa bits alone, and rounds by
// looking for the nearest of all its numbers: it shares no arithmetic with number_formats.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "csrc/hidden_state_packing/pack.h"

namespace speculators {

// What a code stands for; infinity's code for what would be the next number.
inline double value_of(StateFormat format, uint32_t code) {
  if (format == StateFormat::kInt8) return static_cast<int8_t>(code);
  if (format == StateFormat::kFloat32) return double{std::bit_cast<float>(code)};
  const bool half = format == StateFormat::kFloat16;
  const int mantissa_bits = format == StateFormat::kBFloat16 ? 7 : (half ? 10 : 3);
  const int exponent_bits = format == StateFormat::kBFloat16 ? 8 : (half ? 5 : 4);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const auto mantissa = static_cast<int>(code & ((1u << mantissa_bits) - 1));
  const auto exponent = static_cast<int>(code >> mantissa_bits & ((1u << exponent_bits) - 1));
  const int whole = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
  const double magnitude = std::ldexp(whole, std::max(exponent, 1) - bias - mantissa_bits);
  return code >> (mantissa_bits + exponent_bits) != 0 ? -magnitude : magnitude;
}

inline bool is_finite(StateFormat format, uint32_t code) {
  if (format == StateFormat::kFloat8) return (code & 0x7Fu) != 0x7Fu;
  if (format == StateFormat::kBFloat16) return (code & 0x7F80u) != 0x7F80u;
  if (format == StateFormat::kFloat16) return (code & 0x7C00u) != 0x7C00u;
  return format == StateFormat::kInt8 || (code & 0x7F800000u) != 0x7F800000u;
}

inline bool is_nan(StateFormat format, uint32_t code) {
  if (format == StateFormat::kBFloat16) return (code & 0x7FFFu) > 0x7F80u;
  if (format == StateFormat::kFloat16) return (code & 0x7FFFu) > 0x7C00u;
  return format == StateFormat::kFloat32 && (code & 0x7FFFFFFFu) > 0x7F800000u;
}

// The codes of a format's numbers without a sign, in the order of the numbers; of the formats with
// infinity that one, too.
inline uint32_t num_magnitudes(StateFormat format) {
  if (format == StateFormat::kInt8) return 0x80;
  if (format == StateFormat::kFloat8) return 0x7F;
  return format == StateFormat::kBFloat16 ? 0x7F81 : 0x7C01;
}

// The code of the number nearest to a value, of two as near the even one.
inline uint32_t nearest(StateFormat format, float value) {
  if (format == StateFormat::kFloat32) return std::bit_cast<uint32_t>(value);
  const double magnitude = std::abs(double{value});
  uint32_t low = 0;
  uint32_t high = num_magnitudes(format);
  while (high - low > 1) {  // value_of(low) <= magnitude
    const uint32_t middle = low + (high - low) / 2;
    (value_of(format, middle) <= magnitude ? low : high) = middle;
  }
  const uint32_t next = std::min(low + 1, num_magnitudes(format) - 1);
  const double below = magnitude - value_of(format, low);
  const double above = value_of(format, next) - magnitude;
  const uint32_t found = above < below || (above == below && low % 2 == 1) ? next : low;
  if (format == StateFormat::kInt8) return (std::signbit(value) ? 0u - found : found) & 0xFFu;
  const uint32_t sign = format == StateFormat::kFloat8 ? 0x80u : 0x8000u;
  return std::signbit(value) ? found | sign : found;
}

inline int64_t bytes_of(StateFormat format) {
  if (is_quantized(format)) return 1;
  return format == StateFormat::kFloat32 ? 4 : 2;
}

inline uint32_t code_at(StateFormat format, const void* data, int64_t entry) {
  const auto* bytes = static_cast<const uint8_t*>(data) + entry * bytes_of(format);
  uint32_t code = 0;
  for (int64_t i = 0; i < bytes_of(format); ++i) code |= uint32_t{bytes[i]} << (8 * i);
  return code;
}

inline void set_code(StateFormat format, uint32_t code, void* data, int64_t entry) {
  auto* bytes = static_cast<uint8_t*>(data) + entry * bytes_of(format);
  for (int64_t i = 0; i < bytes_of(format); ++i) bytes[i] = static_cast<uint8_t>(code >> (8 * i));
}

struct PackShape {
  StateFormat from, to;
  int64_t num_layers, num_rows, width;
  int64_t padding = 0;    // entries between two rows
  bool has_index = true;  // else all rows in their order
};

// Rows of random entries, exactly up to the last one, so that a sanitizer sees what is read behind
// it. The memory is aligned for the kernels' vectors.
class StateMemory {
 public:
  StateMemory(StateFormat format, int64_t rows, int64_t width, int64_t padding,
              std::mt19937* random)
      : format_(format), row_stride_(width + padding) {
    const int64_t entries = rows * (width + padding) - (rows > 0 ? padding : 0);
    memory_.resize(static_cast<size_t>(entries * bytes_of(format_)));
    for (int64_t i = 0; i < entries; ++i) set_code(format_, draw(random), memory_.data(), i);
  }

  StateRows rows() const { return {memory_.data(), row_stride_}; }
  const std::vector<uint8_t>& memory() const { return memory_; }

  uint32_t get(int64_t row, int64_t entry) const {
    return code_at(format_, memory_.data(), row * row_stride_ + entry);
  }
  void set(int64_t row, int64_t entry, uint32_t code) {
    set_code(format_, code, memory_.data(), row * row_stride_ + entry);
  }

 private:
  // A finite number of middling size, of either sign; of a format with scales any finite one.
  uint32_t draw(std::mt19937* random) const {
    const auto bits = static_cast<uint32_t>((*random)());
    if (is_quantized(format_)) return is_finite(format_, bits & 0xFFu) ? bits & 0xFFu : 0;
    const int kept =
        24 - (format_ == StateFormat::kFloat32 ? 0 : (format_ == StateFormat::kFloat16 ? 13 : 16));
    const float value =
        std::ldexp(static_cast<float>(bits >> (32 - kept)), -kept + static_cast<int>(bits % 12));
    return nearest(format_, (bits & 64u) != 0 ? -value : value);
  }

  StateFormat format_;
  int64_t row_stride_;
  std::vector<uint8_t> memory_;
};

// A call of the packing, neither copied nor moved.
class PackCase {
 public:
  PackCase(const PackShape& shape, unsigned seed)
      : shape_(shape), random_(seed * 7919 + 1), num_tokens_(shape.has_index ? 9 : shape.num_rows) {
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      layers_.emplace_back(shape.from, num_tokens_, shape.width, shape.padding, &random_);
    }
    for (const StateMemory& layer : layers_) rows_.push_back(layer.rows());
    for (int64_t row = 0; row < shape.num_rows; ++row) {
      index_.push_back(shape.has_index ? static_cast<int64_t>(random_() % 9) : row);
    }
    packed_.assign(static_cast<size_t>(shape.num_rows * shape.num_layers * shape.width), 0xEE);
    scales_.assign(static_cast<size_t>(shape.num_rows * shape.num_layers), -7);
    call.from = shape.from;
    call.to = shape.to;
    call.num_layers = shape.num_layers;
    call.num_tokens = num_tokens_;
    call.width = shape.width;
    call.num_rows = shape.num_rows;
    call.layers = rows_.data();
    call.index = shape.has_index ? index_.data() : nullptr;
    call.packed = packed_.data();
    call.scales = scales_.data();
  }
  PackCase(const PackCase&) = delete;
  PackCase& operator=(const PackCase&) = delete;

  PackCall call;

  // Makes one entry of one layer's token this number, or all of them.
  void set(int64_t layer, int64_t token, int64_t entry, float value) {
    layers_[static_cast<size_t>(layer)].set(token, entry, code_of(value));
  }
  void fill(int64_t layer, int64_t token, float value) {
    for (int64_t entry = 0; entry < shape_.width; ++entry) set(layer, token, entry, value);
  }
  void set_index(int64_t row, int64_t token) { index_[static_cast<size_t>(row)] = token; }

  float scale(int64_t row, int64_t layer) const {
    return scales_[static_cast<size_t>(row * shape_.num_layers + layer)];
  }

  bool is_right() const {
    bool right = true;
    for (int64_t row = 0; row < shape_.num_rows; ++row) {
      for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
        right = row_is_right(row, layer) && right;
      }
    }
    return right;
  }

  const std::vector<uint8_t>& packed() const { return packed_; }
  const std::vector<float>& scales() const { return scales_; }

 private:
  // For infinities and NaN, which have no nearest number.
  uint32_t code_of(float value) const {
    if (std::isfinite(value) || shape_.from == StateFormat::kFloat32) {
      return nearest(shape_.from, value);
    }
    const uint32_t infinity = num_magnitudes(shape_.from) - 1;
    return (std::isnan(value) ? infinity + 1 : infinity) | (std::signbit(value) ? 0x8000u : 0u);
  }

  bool row_is_right(int64_t row, int64_t layer) const {
    const StateMemory& from = layers_[static_cast<size_t>(layer)];
    const int64_t token = index_[static_cast<size_t>(row)];
    const float code = shape_.to == StateFormat::kInt8 ? 127 : 448;
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < shape_.width; ++i) {
      finite = finite && is_finite(shape_.from, from.get(token, i));
      largest = std::max(largest,
                         static_cast<float>(std::abs(value_of(shape_.from, from.get(token, i)))));
    }
    const bool is_nothing = largest < 0x1p-100f;
    const float expected = is_nothing ? 0 : largest / code;
    const float inverse = is_nothing ? 0 : code / largest;
    bool right = finite ? scale(row, layer) == expected : std::isnan(scale(row, layer));
    if (!right) report("scale", row, layer, 0, scale(row, layer), expected);
    for (int64_t i = 0; i < shape_.width; ++i) {
      const auto entry = static_cast<float>(value_of(shape_.from, from.get(token, i)));
      const uint32_t wanted = finite ? nearest(shape_.to, entry * inverse) : 0;
      const uint32_t found =
          packed_[static_cast<size_t>((row * shape_.num_layers + layer) * shape_.width + i)];
      if (found == wanted) continue;
      report("code", row, layer, i, found, wanted);
      right = false;
    }
    return right;
  }

  static void report(const char* what, int64_t row, int64_t layer, int64_t entry, double found,
                     double expected) {
    std::printf("%s of row %ld, layer %ld, entry %ld: found %.9g, expected %.9g\n", what,
                static_cast<long>(row), static_cast<long>(layer), static_cast<long>(entry), found,
                expected);
  }

  PackShape shape_;
  std::mt19937 random_;
  int64_t num_tokens_;
  std::vector<StateMemory> layers_;
  std::vector<StateRows> rows_;
  std::vector<int64_t> index_;
  std::vector<uint8_t> packed_;
  std::vector<float> scales_;
};

// A call of the unpacking, neither copied nor moved. The rows go to some of twice as many.
class UnpackCase {
 public:
  UnpackCase(const PackShape& shape, unsigned seed)
      : shape_(shape),
        random_(seed * 7919 + 2),
        packed_(shape.from, shape.num_rows, shape.num_layers * shape.width, shape.padding,
                &random_) {
    const int64_t num_targets = 2 * shape.num_rows;
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      targets_.emplace_back(shape.to, num_targets, shape.width, shape.padding, &random_);
    }
    for (const StateMemory& target : targets_) rows_.push_back(target.rows());
    before_ = targets_;
    for (int64_t row = 0; row < num_targets; ++row) index_.push_back(row);
    if (shape.has_index) std::shuffle(index_.begin(), index_.end(), random_);
    index_.resize(static_cast<size_t>(shape.num_rows));
    const int64_t stride = shape.num_layers + shape.padding;
    std::uniform_real_distribution<float> uniform(0.001f, 0.1f);
    scales_.resize(
        static_cast<size_t>(shape.num_rows * stride - (shape.num_rows > 0 ? shape.padding : 0)));
    for (float& scale : scales_) scale = uniform(random_);
    call.from = shape.from;
    call.to = shape.to;
    call.num_layers = shape.num_layers;
    call.num_targets = num_targets;
    call.width = shape.width;
    call.num_rows = shape.num_rows;
    call.packed = packed_.rows();
    call.scales = is_quantized(shape.from) ? scales_.data() : nullptr;
    call.scales_row_stride = stride;
    call.index = shape.has_index ? index_.data() : nullptr;
    call.targets = rows_.data();
  }
  UnpackCase(const UnpackCase&) = delete;
  UnpackCase& operator=(const UnpackCase&) = delete;

  UnpackCall call;

  void set_scale(int64_t row, int64_t layer, float scale) {
    scales_[static_cast<size_t>(row * call.scales_row_stride + layer)] = scale;
  }
  void set_code(int64_t row, int64_t entry, uint32_t code) { packed_.set(row, entry, code); }
  void set_index(int64_t row, int64_t target) { index_[static_cast<size_t>(row)] = target; }

  // Whether every byte of the targets is as it must be, those between and beside the rows too.
  bool is_right() const {
    bool right = true;
    std::vector<StateMemory> expected = before_;
    for (int64_t row = 0; row < shape_.num_rows; ++row) {
      for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
        for (int64_t i = 0; i < shape_.width; ++i) {
          const int64_t to = index_[static_cast<size_t>(row)];
          const uint32_t found = targets_[static_cast<size_t>(layer)].get(to, i);
          uint32_t wanted = expected_code(row, layer, i);
          // One NaN is as good as another.
          if (is_nan(shape_.to, wanted) && is_nan(shape_.to, found)) wanted = found;
          expected[static_cast<size_t>(layer)].set(to, i, wanted);
        }
      }
    }
    for (size_t layer = 0; layer < expected.size(); ++layer) {
      right = expected[layer].memory() == targets_[layer].memory() && right;
    }
    return right;
  }

  std::vector<std::vector<uint8_t>> bytes() const {
    std::vector<std::vector<uint8_t>> all;
    for (const StateMemory& target : targets_) all.push_back(target.memory());
    return all;
  }

 private:
  uint32_t expected_code(int64_t row, int64_t layer, int64_t entry) const {
    const uint32_t code = packed_.get(row, layer * shape_.width + entry);
    if (shape_.from == shape_.to) return code;
    const float scale = scales_[static_cast<size_t>(row * call.scales_row_stride + layer)];
    const float value = static_cast<float>(value_of(shape_.from, code)) * scale;
    if (std::isnan(value) || !is_finite(shape_.from, code)) {
      return nearest(shape_.to, std::numeric_limits<float>::infinity()) + 1;
    }
    return nearest(shape_.to, value);
  }

  PackShape shape_;
  std::mt19937 random_;
  StateMemory packed_;
  std::vector<StateMemory> targets_, before_;
  std::vector<StateRows> rows_;
  std::vector<int64_t> index_;
  std::vector<float> scales_;
};

}  // namespace speculators
