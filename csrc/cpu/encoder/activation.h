// exp, and the activation functions of encoders, in elementary operations: the same bits on every path.
#pragma once
#include "../../kmq.h"
#include "../lanes.h"

namespace kmq::cpu {

// e^x of numbers up to 88.3, within 2 units in the last place; 0 below -87.3, where it would be subnormal. Not for NaN.
template <int W>
KMQ_PLAIN Floats<W> exp_of(Floats<W> x) {
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: rounds to an integer, in the low bits
  const Floats<W> shifted = fused<W>(x, all<W>(1.44269504f), all<W>(round)), n = shifted - round;
  const Floats<W> r = fused<W>(n, all<W>(2.12194440e-4f), fused<W>(n, all<W>(-0.693359375f), x));
  Floats<W> p = fused<W>(all<W>(1.9875691500e-4f), r, all<W>(1.3981999507e-3f));
  p = fused<W>(p, r, all<W>(8.3334519073e-3f));
  p = fused<W>(p, r, all<W>(4.1665795894e-2f));
  p = fused<W>(p, r, all<W>(1.6666665459e-1f));
  p = fused<W>(p, r, all<W>(5.0000001201e-1f));
  p = fused<W>(p * r, r, r) + 1.0f;
  const Floats<W> result = Floats<W>(Bits<W>(p) + (Bits<W>(shifted) << 23));  // 2^n times: n more in the exponent
  return x >= -87.33f ? result : Floats<W>{};
}

// 1 / x for 1 <= x <= 1e37, within 2 units in the last place, by three steps of Newton from a guess within an eighth: a division of a
// vector takes as long as sixteen other operations.
template <int W>
KMQ_PLAIN Floats<W> reciprocal_of(Floats<W> x) {
  Floats<W> r = Floats<W>(0x7ef311c7u - Bits<W>(x));
  for (int i = 0; i < 3; ++i) r = fused<W>(r, fused<W>(-x, r, all<W>(1.0f)), r);
  return r;
}

// x * P(Z <= x) for a normal Z, within 1e-6: P by formula 26.2.19 of Abramowitz and Stegun. The tail beyond 13 is taken as that at 13.
template <int W>
KMQ_PLAIN Floats<W> gelu_of(Floats<W> x) {
  const Floats<W> magnitude = Floats<W>(Bits<W>(x) & 0x7fffffffu), m = magnitude > 13.0f ? all<W>(13.0f) : magnitude;
  Floats<W> p = fused<W>(all<W>(0.0000053830f), m, all<W>(0.0000488906f));
  p = fused<W>(p, m, all<W>(0.0000380036f));
  p = fused<W>(p, m, all<W>(0.0032776263f));
  p = fused<W>(p, m, all<W>(0.0211410061f));
  p = fused<W>(p, m, all<W>(0.0498673470f));
  p = fused<W>(p, m, all<W>(1.0f));
  p = p * p;
  p = p * p;
  p = p * p;
  p = p * p;
  return fused<W>(m * -0.5f, reciprocal_of<W>(p), x > 0.0f ? x : Floats<W>{});  // the product is |x| * P(Z > |x|)
}

// x / (1 + e^-y)
template <int W>
KMQ_PLAIN Floats<W> gated(Floats<W> x, Floats<W> y) {
  const Floats<W> result = x / (1.0f + exp_of<W>(Smaller::of(-y, all<W>(88.3f))));
  return y < -88.3f ? Floats<W>{} : result;
}

// NaN stays NaN.
template <int W, Activation activation>
KMQ_PLAIN Floats<W> activated(Floats<W> x) {
  if constexpr (activation == Activation::gelu) return gelu_of<W>(x);
  if constexpr (activation == Activation::gelu_tanh) return gated<W>(x, 1.5957691216f * (x + 0.044715f * x * x * x));
  if constexpr (activation == Activation::silu) return gated<W>(x, x);
  if constexpr (activation == Activation::relu) return x < 0.0f ? Floats<W>{} : x;
  return x;
}

template <int W, Activation activation>
KMQ_PLAIN void activate_plain(float* values, int64_t count) {
  for (int64_t i = 0; i < count; i += W) store_floats<W>(values + i, activated<W, activation>(load_floats<W>(values + i, count - i)), count - i);
}

template <Activation activation>
void activate_scalar(float* values, int64_t count) {
  activate_plain<kWidthScalar, activation>(values, count);
}

#ifdef KMQ_X86
template <Activation activation>
KMQ_AVX2 void activate_avx2(float* values, int64_t count) {
  activate_plain<kWidthAvx2, activation>(values, count);
}

template <Activation activation>
KMQ_AVX512 void activate_avx512(float* values, int64_t count) {
  activate_plain<kWidthAvx512, activation>(values, count);
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

// values[0 .. count) = activation of them.
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
