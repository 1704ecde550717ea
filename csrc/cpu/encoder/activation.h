// exp, and the activation functions of encoders, in elementary operations: the same bits on every path.
#pragma once
#include "../../kmq.h"
#include "../lanes.h"

namespace kmq::cpu {

// e^x of numbers up to 88.3, within 2 units in the last place; 0 below -87.3, where it would be subnormal. Not for NaN.
KMQ_PLAIN Floats exp_of(Floats x) {
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, in the low bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Floats result = p * Floats(((Ints)shifted - 0x4b400000 + 127) << 23);
  return x >= -87.33f ? result : Floats{};
}

// x * P(Z <= x) for a normal Z, within 1e-6: P by formula 7.1.28 of Abramowitz and Stegun.
KMQ_PLAIN Floats gelu_of(Floats x) {
  const Floats magnitude = x < 0.0f ? -x : x, m = magnitude > 40.0f ? Floats{} + 40.0f : magnitude, z = m * 0.70710678f;
  Floats p = 0.0000430638f * z + 0.0002765672f;
  p = p * z + 0.0001520143f;
  p = p * z + 0.0092705272f;
  p = p * z + 0.0422820123f;
  p = p * z + 0.0705230784f;
  p = p * z + 1.0f;
  p = p * p;
  p = p * p;
  p = p * p;
  p = p * p;
  return (x > 0.0f ? x : Floats{}) - 0.5f * m / p;  // the second term is |x| * P(Z > |x|)
}

// x / (1 + e^-y)
KMQ_PLAIN Floats gated(Floats x, Floats y) {
  const Floats result = x / (1.0f + exp_of(Smaller::of(-y, Floats{} + 88.3f)));
  return y < -88.3f ? Floats{} : result;
}

// values[0 .. count) = activation of them; NaN stays NaN.
template <Activation activation>
KMQ_PLAIN void activate_plain(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const Floats x = load_floats(values + i, count - i);
    Floats y = x;
    if constexpr (activation == Activation::gelu) y = gelu_of(x);
    if constexpr (activation == Activation::gelu_tanh) y = gated(x, 1.5957691216f * (x + 0.044715f * x * x * x));
    if constexpr (activation == Activation::silu) y = gated(x, x);
    if constexpr (activation == Activation::relu) y = x < 0.0f ? Floats{} : x;
    store_floats(values + i, y, count - i);
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
