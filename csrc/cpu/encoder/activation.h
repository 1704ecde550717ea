// exp, and the activation functions of encoders, in elementary operations: the same bits on every path.
//
// The compiler vectorizes the loops around them only where it sees no branch, so that conditions are masks.
#pragma once
#include "../../kmq.h"
#include "../half.h"
#include "../simd.h"

namespace kmq::cpu {

// a where the condition holds, else b.
KMQ_PLAIN float pick(bool condition, float a, float b) {
  const uint32_t mask = 0u - uint32_t(condition);
  return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

// e^x within 2 units in the last place; 0 below -87.3 (where it would be subnormal), e^88.3 above 88.3. Not for NaN.
KMQ_PLAIN float exp_of(float x) {
  const float most = pick(x < 88.3f, x, 88.3f);
  const float shifted = most * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (most - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float result = p * float_of((bits_of(shifted) - 0x4b400000u + 127u) << 23);
  return pick(x >= -87.33f, result, 0.0f);
}

// x * P(Z <= x) for a normal Z, within 4e-7: P by formula 7.1.26 of Abramowitz and Stegun, whose relative error is small for negative x.
KMQ_PLAIN float gelu_of(float x) {
  const float magnitude = float_of(bits_of(x) & 0x7fffffffu), m = pick(magnitude > 40.0f, 40.0f, magnitude), z = m * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return pick(x > 0.0f, x, 0.0f) - 0.5f * m * (p * t * exp_of(-z * z));  // the second term is |x| * P(Z > |x|)
}

// x / (1 + e^-y)
KMQ_PLAIN float gated(float x, float y) { return x / (1.0f + exp_of(-y)); }

// values[0 .. count) = activation of them; NaN stays NaN.
template <Activation activation>
KMQ_PLAIN void activate_plain(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = values[i];
    if constexpr (activation == Activation::gelu) values[i] = gelu_of(x);
    if constexpr (activation == Activation::gelu_tanh) values[i] = gated(x, 1.5957691216f * (x + 0.044715f * x * x * x));
    if constexpr (activation == Activation::silu) values[i] = gated(x, x);
    if constexpr (activation == Activation::relu) values[i] = pick(x < 0.0f, 0.0f, x);
  }
}

template <Activation activation>
void activate_scalar(float* values, int64_t count) {
  activate_plain<activation>(values, count);
}

#ifdef KMQ_X86
template <Activation activation>
KMQ_AVX2 void activate_avx2(float* values, int64_t count) {
  activate_plain<activation>(values, count);
}

template <Activation activation>
KMQ_AVX512 void activate_avx512(float* values, int64_t count) {
  activate_plain<activation>(values, count);
}
#endif

template <Activation activation>
void activate_as(float* values, int64_t count) {
#ifdef KMQ_X86
  if (avx512()) return activate_avx512<activation>(values, count);
  if (avx2()) return activate_avx2<activation>(values, count);
#endif
  activate_scalar<activation>(values, count);
}

inline void activate(Activation activation, float* values, int64_t count) {
  switch (activation) {
    case Activation::none: return;
    case Activation::gelu: return activate_as<Activation::gelu>(values, count);
    case Activation::gelu_tanh: return activate_as<Activation::gelu_tanh>(values, count);
    case Activation::relu: return activate_as<Activation::relu>(values, count);
    case Activation::silu: return activate_as<Activation::silu>(values, count);
  }
}

}  // namespace kmq::cpu
