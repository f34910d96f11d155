// IEEE half precision in 16 bits, without the help of the processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace rvgg {

constexpr float kLargestHalf = 65504.0f;

// To the nearest, to even if two are; too large a number becomes infinity.
static inline std::uint16_t to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (!(size < 65520.0f)) return static_cast<std::uint16_t>(sign | (size > 0 ? 0x7c00 : 0x7e00));
  int exponent = 0;
  std::frexp(size, &exponent);
  // Steps of 2^-10 of the leading digit, and of 2^-24 where the exponent can get no smaller.
  exponent = size == 0 ? -14 : exponent - 1;
  if (exponent < -14) exponent = -14;
  const auto steps = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  // A carry out of the digits goes into the exponent, as it should.
  return static_cast<std::uint16_t>(sign | (static_cast<std::uint32_t>(exponent + 14) * 1024 + steps));
}

static inline float from_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
  const std::uint32_t digits = static_cast<std::uint32_t>(half & 0x7fff) << 13;
  float value;
  std::memcpy(&value, &digits, 4);
  value *= 0x1p112f;  // the other offset of the exponent; right for the smallest numbers too
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace rvgg
