// The number formats against their definition, every number of them; and the CPU kernels.
#include "csrc/hidden_state_packing/pack.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "csrc/common/testing.h"
#include "csrc/hidden_state_packing/pack_testing.h"

namespace {

using speculators::from_code;
using speculators::from_float;
using speculators::is_finite;
using speculators::nearest;
using speculators::num_magnitudes;
using speculators::pack_rows_cpu;
using speculators::PackCase;
using speculators::PackShape;
using speculators::to_code;
using speculators::to_float;
using speculators::unpack_rows_cpu;
using speculators::UnpackCase;
using speculators::value_of;
using Format = speculators::StateFormat;

constexpr Format kFloats[] = {Format::kBFloat16, Format::kFloat16, Format::kFloat32};
constexpr Format kScaled[] = {Format::kInt8, Format::kFloat8};
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <Format kFormat>
void expect_every_number_is_read() {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const double found = to_float<kFormat>(static_cast<uint16_t>(code));
    if (is_finite(kFormat, code)) EXPECT_EQ(found, value_of(kFormat, code));
    if (is_finite(kFormat, code)) EXPECT_EQ(std::signbit(found), code >= 0x8000);
  }
  const uint32_t infinity = num_magnitudes(kFormat) - 1;
  EXPECT_EQ(to_float<kFormat>(static_cast<uint16_t>(infinity)), kInfinity);
  EXPECT_EQ(to_float<kFormat>(static_cast<uint16_t>(infinity | 0x8000u)), -kInfinity);
  EXPECT_TRUE(std::isnan(to_float<kFormat>(static_cast<uint16_t>(infinity + 1))));
}

TEST(every_number_of_two_bytes_is_read) {
  expect_every_number_is_read<Format::kBFloat16>();
  expect_every_number_is_read<Format::kFloat16>();
}

TEST(every_code_is_read) {
  for (uint32_t code = 0; code < 0x100; ++code) {
    const auto byte = static_cast<uint8_t>(code);
    EXPECT_EQ(from_code<Format::kInt8>(byte), value_of(Format::kInt8, code));
    const float found = from_code<Format::kFloat8>(byte);
    if (is_finite(Format::kFloat8, code)) {
      EXPECT_EQ(found, value_of(Format::kFloat8, code));
    } else {
      EXPECT_TRUE(std::isnan(found));
    }
  }
}

// Every number of a format, what is half way to the next, and the floats beside those.
template <typename Expect>
void for_values_around(Format format, float limit, Expect expect) {
  for (uint32_t code = 0; code + 1 < num_magnitudes(format); ++code) {
    const double low = value_of(format, code);
    const double high = value_of(format, code + 1);
    for (const double value : {low, (low + high) / 2}) {
      const auto exact = static_cast<float>(value);
      for (const float x : {exact, std::nextafter(exact, 0.0f), std::nextafter(exact, kInfinity)}) {
        if (std::abs(x) > limit) continue;
        expect(x);
        expect(-x);
      }
    }
  }
}

TEST(every_number_is_rounded_to_the_nearest) {
  for_values_around(Format::kBFloat16, kInfinity, [](float x) {
    EXPECT_EQ(from_float<Format::kBFloat16>(x), nearest(Format::kBFloat16, x));
  });
  for_values_around(Format::kFloat16, kInfinity, [](float x) {
    EXPECT_EQ(from_float<Format::kFloat16>(x), nearest(Format::kFloat16, x));
  });
  for_values_around(Format::kInt8, 127, [](float x) {
    EXPECT_EQ(to_code<Format::kInt8>(x), nearest(Format::kInt8, x));
  });
  for_values_around(Format::kFloat8, 448, [](float x) {
    EXPECT_EQ(to_code<Format::kFloat8>(x), nearest(Format::kFloat8, x));
  });
  for (const float x : {65520.0f, 65519.996f, 65536.0f, 1e9f, kInfinity}) {
    EXPECT_EQ(from_float<Format::kFloat16>(x), nearest(Format::kFloat16, x));
    EXPECT_EQ(from_float<Format::kFloat16>(-x), nearest(Format::kFloat16, -x));
  }
  EXPECT_EQ(from_float<Format::kFloat16>(kNan), 0x7E00);
  EXPECT_EQ(from_float<Format::kBFloat16>(-kNan), 0x7FC0);
  EXPECT_EQ(from_float<Format::kBFloat16>(3.4e38f), 0x7F80);
}

// Runs in two ranges, as two threads would do it; the second first.
void run(const speculators::PackCall& call) {
  pack_rows_cpu(call, call.num_rows / 3, call.num_rows);
  pack_rows_cpu(call, 0, call.num_rows / 3);
}

void run(const speculators::UnpackCall& call) {
  unpack_rows_cpu(call, call.num_rows / 3, call.num_rows);
  unpack_rows_cpu(call, 0, call.num_rows / 3);
}

TEST(packing_every_format_and_width) {
  for (const Format from : kFloats) {
    for (const Format to : kScaled) {
      for (const int64_t width : {0, 1, 7, 31, 32, 33, 64, 100, 257}) {
        for (const bool has_index : {false, true}) {
          PackCase c({from, to, 3, 8, width, has_index ? 5 : 0, has_index}, 1);
          run(c.call);
          EXPECT_TRUE(c.is_right());
        }
      }
    }
  }
}

TEST(rows_of_special_numbers) {
  for (const Format from : kFloats) {
    for (const Format to : kScaled) {
      PackCase c({from, to, 2, 8, 70, 0, false}, 2);
      c.fill(0, 0, 0);
      c.fill(1, 0, -0.0f);
      c.fill(0, 1, 0x1p-126f);  // bfloat16's and float's least normal number; float16's 0
      c.fill(1, 1, 1);
      c.set(0, 2, 69, kInfinity);
      c.set(1, 2, 0, -kInfinity);
      c.set(0, 3, 33, kNan);
      c.set(1, 3, 33, -kNan);
      c.set(0, 4, 69, -30000);  // the largest magnitude is negative, and the last entry
      c.set(1, 4, 0, 30000);
      run(c.call);
      EXPECT_TRUE(c.is_right());
      EXPECT_EQ(c.scale(0, 0), 0);
      EXPECT_EQ(c.scale(0, 1), 0);
      EXPECT_TRUE(std::isnan(c.scale(2, 0)) && std::isnan(c.scale(2, 1)));
      EXPECT_TRUE(std::isnan(c.scale(3, 0)) && std::isnan(c.scale(3, 1)));
    }
  }
}

TEST(the_largest_of_a_row_never_leaves_the_codes) {
  // a * (c / a) may be a little more than c.
  std::mt19937 random(3);
  for (int number = 0; number < 100000; ++number) {
    const uint32_t bits = static_cast<uint32_t>(random()) & 0x7FFFFFFFu;
    const auto largest = std::bit_cast<float>(bits);
    if (!std::isfinite(largest) || largest < 0x1p-100f) continue;
    const float int8 = largest * speculators::row_scale<Format::kInt8>(bits).inverse;
    const float float8 = largest * speculators::row_scale<Format::kFloat8>(bits).inverse;
    EXPECT_EQ(to_code<Format::kInt8>(int8), 127);
    EXPECT_EQ(to_code<Format::kInt8>(-int8), 0x81);
    EXPECT_EQ(to_code<Format::kFloat8>(float8), 0x7E);
    EXPECT_EQ(to_code<Format::kFloat8>(-float8), 0xFE);
  }
}

TEST(unpacking_every_format_and_width) {
  for (const Format to : kFloats) {
    for (const Format from : {Format::kInt8, Format::kFloat8, to}) {
      for (const int64_t width : {0, 1, 7, 32, 33, 100}) {
        for (const bool has_index : {false, true}) {
          UnpackCase c({from, to, 3, 8, width, has_index ? 5 : 0, has_index}, 4);
          if (width > 0) c.set_code(1, 0, 0x7F);  // float8's NaN
          c.set_scale(2, 1, kNan);
          c.set_scale(3, 0, 0);
          run(c.call);
          EXPECT_TRUE(c.is_right());
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return speculators::testing::run_all_tests(argc, argv); }
