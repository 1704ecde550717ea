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

inline void narrow(float x, float& out) { out = x; }

inline void narrow(float x, bf16& out) {
  const uint32_t u = bits_of(x);
  out.raw = x != x ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline void narrow(float x, f16& out) {
  const uint32_t u = bits_of(x), magnitude = u & 0x7fffffff;
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  if (magnitude > 0x7f800000) out.raw = uint16_t(sign | 0x7e00);  // NaN
  else if (magnitude >= 0x477ff000) out.raw = uint16_t(sign | 0x7c00);  // rounds to 65536 or more: Inf
  else if (magnitude < 0x38800000) {
    // Below 2^-14 the result is subnormal, in units of 2^-24: adding 0.5 rounds to that unit in the last places of the sum.
    out.raw = uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  } else {
    out.raw = uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13));
  }
}

}  // namespace kmq::cpu
