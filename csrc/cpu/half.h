// bf16 and fp16 as plain structs with exact widening and round-to-nearest-even narrowing.
#pragma once
#include <cstdint>
#include <cstring>

namespace kmq::cpu {

inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float float_of(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

struct bf16 {
  uint16_t raw;
  explicit operator float() const { return float_of(uint32_t(raw) << 16); }
};

struct f16 {
  uint16_t raw;
  explicit operator float() const {
    const uint32_t sign = uint32_t(raw & 0x8000) << 16, magnitude = raw & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));  // Inf, NaN
    // Scaling by 2^112 moves the exponent from bias 15 to 127 and makes subnormals exact.
    return float_of(sign | bits_of(float_of(magnitude << 13) * float_of((127 + 112) << 23)));
  }
};

}  // namespace kmq::cpu
