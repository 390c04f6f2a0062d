// exp and log in float32 that a compiler turns into vector code: no branch, no call, no table.
//
// The C library's functions are correct to half a unit in the last place, but one number at a time
// (its vector versions want -ffast-math). The polynomials are those of the Cephes library
// (S. Moshier, expf and logf). The test measures at most 2 units in the last place.
#pragma once

#include <bit>
#include <cstdint>

#define SPECULATORS_INLINE inline __attribute__((always_inline))

namespace speculators {

// e^x for -87.33 <= x <= 88, where the result is a normal float.
SPECULATORS_INLINE float exponential_in_range(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f;  // few bits, so that n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the bits
  const float shifted = x * kLog2E + kToInteger;
  const float n = shifted - kToInteger;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3F800000u);
  return y * power;
}

// The value, or 0. A mask and no choice between two values, which some compilers would make a
// branch.
SPECULATORS_INLINE float value_unless(bool zero, float value) {
  const uint32_t mask = static_cast<uint32_t>(zero) - 1;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) & mask);
}

// e^x for x <= 88. Below -87.33, where the result would be less than the smallest normal float, it
// is 0. NaN stays NaN.
SPECULATORS_INLINE float exponential(float x) {
  return value_unless(x < -87.33f, exponential_in_range(x));
}

// The same, but 0 for NaN too.
SPECULATORS_INLINE float exponential_or_zero(float x) {
  return value_unless(!(x >= -87.33f), exponential_in_range(x));
}

// log x for normal x > 0; something finite for every other x.
SPECULATORS_INLINE float logarithm(float x) {
  constexpr uint32_t kRootOfHalf = 0x3F3504F3u;
  const uint32_t bits = std::bit_cast<uint32_t>(x) - kRootOfHalf;
  const int32_t exponent = static_cast<int32_t>(bits) >> 23;
  const float n = static_cast<float>(exponent);
  // The mantissa between sqrt(1/2) and sqrt(2), less 1.
  const float f = std::bit_cast<float>((bits & 0x007FFFFFu) + kRootOfHalf) - 1.0f;
  const float square = f * f;
  float y = 7.0376836292e-2f;
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * square - 2.12194440e-4f * n - 0.5f * square;
  return (f + y) + 0.693359375f * n;
}

}  // namespace speculators
