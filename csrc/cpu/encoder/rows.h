// What is done to single rows of an encoder's states: normalization, softmax, sums; the same bits on every path.
#pragma once
#include <cmath>

#include "activation.h"

namespace kmq::cpu {

// to = (x + add) normalized; add may be null, `to` may be x.
template <int W>
KMQ_PLAIN void normalize_plain(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
  Sixteen<float, W> sum(0);
  for (int64_t i = 0; i < count; i += kWidth)
    for (int h = 0; h < kWidth / W; ++h) {
      const int64_t at = i + h * W;
      Floats<W> row = load_floats<W>(x + at, count - at);
      if (add) row += load_floats<W>(add + at, count - at);
      sum.part[h] += row;
      store_floats<W>(to + at, row, count - at);
    }
  if (!norm.weight) return;
  const float guess = sum.template fold<Sum>() / float(count);
  // What the guess is off by, which a row of nearly equal numbers would show: its deviations are of that size.
  Sixteen<float, W> off(0), squares(0);
  for (int64_t i = 0; i < count; i += kWidth)
    for (int h = 0; h < kWidth / W; ++h) {
      const Floats<W> d = load_floats<W>(to + i + h * W, count - i - h * W, guess) - guess;
      off.part[h] += d;
      squares.part[h] = fused<W>(d, d, squares.part[h]);
    }
  const float shift = off.template fold<Sum>() / float(count), mean = guess + shift;
  const float unshifted = squares.template fold<Sum>() / float(count) - shift * shift, variance = unshifted < 0.0f ? 0.0f : unshifted;
  const float factor = 1.0f / std::sqrt(variance + norm.eps);
  for (int64_t i = 0; i < count; i += W) {
    Floats<W> y = (load_floats<W>(to + i, count - i) - mean) * factor * load_floats<W>(norm.weight + i, count - i);
    if (norm.bias) y += load_floats<W>(norm.bias + i, count - i);
    store_floats<W>(to + i, y, count - i);
  }
}

// The largest of count numbers (a multiple of 16), or `least`.
template <int W>
KMQ_PLAIN float largest_of(const float* x, int64_t count, float least) {
  Sixteen<float, W> most(least);
  for (int64_t i = 0; i < count; i += kWidth)
    for (int h = 0; h < kWidth / W; ++h) most.part[h] = Larger::of(load_floats<W>(x + i + h * W), most.part[h]);
  return most.template fold<Larger>();
}

// x = e^(x - most) for count numbers (a multiple of 16), added to `sum`.
template <int W>
KMQ_PLAIN void exponentials(float* x, int64_t count, float most, Sixteen<float, W>& sum) {
  for (int64_t i = 0; i < count; i += kWidth)
    for (int h = 0; h < kWidth / W; ++h) {
      const Floats<W> y = exp_of<W>(load_floats<W>(x + i + h * W) - most);
      store_floats<W>(x + i + h * W, y);
      sum.part[h] += y;
    }
}

// Rows [rows, count], ld apart, each times a factor of its own. `to` may be `from`.
template <int W>
KMQ_PLAIN void scale_rows_plain(const float* from, int64_t ld, int64_t rows, int64_t count, const float* factors, float* to, int64_t ld_to) {
  for (int64_t i = 0; i < rows; ++i, from += ld, to += ld_to)
    for (int64_t e = 0; e < count; e += W) store_floats<W>(to + e, load_floats<W>(from + e, count - e) * factors[i], count - e);
}

inline void normalize_scalar(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
  normalize_plain<kWidthScalar>(x, add, count, norm, to);
}

inline void scale_rows_scalar(const float* from, int64_t ld, int64_t rows, int64_t count, const float* factors, float* to, int64_t ld_to) {
  scale_rows_plain<kWidthScalar>(from, ld, rows, count, factors, to, ld_to);
}

#ifdef KMQ_X86
KMQ_AVX2 inline void normalize_avx2(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
  normalize_plain<kWidthAvx2>(x, add, count, norm, to);
}

KMQ_AVX512 inline void normalize_avx512(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
  normalize_plain<kWidthAvx512>(x, add, count, norm, to);
}

KMQ_AVX2 inline void scale_rows_avx2(const float* from, int64_t ld, int64_t rows, int64_t count, const float* factors, float* to, int64_t ld_to) {
  scale_rows_plain<kWidthAvx2>(from, ld, rows, count, factors, to, ld_to);
}

KMQ_AVX512 inline void scale_rows_avx512(const float* from, int64_t ld, int64_t rows, int64_t count, const float* factors, float* to, int64_t ld_to) {
  scale_rows_plain<kWidthAvx512>(from, ld, rows, count, factors, to, ld_to);
}
#endif

inline void normalize(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
#ifdef KMQ_X86
  if (avx512()) return normalize_avx512(x, add, count, norm, to);
  if (avx2()) return normalize_avx2(x, add, count, norm, to);
#endif
  normalize_scalar(x, add, count, norm, to);
}

inline void scale_rows(const float* from, int64_t ld, int64_t rows, int64_t count, const float* factors, float* to, int64_t ld_to) {
#ifdef KMQ_X86
  if (avx512()) return scale_rows_avx512(from, ld, rows, count, factors, to, ld_to);
  if (avx2()) return scale_rows_avx2(from, ld, rows, count, factors, to, ld_to);
#endif
  scale_rows_scalar(from, ld, rows, count, factors, to, ld_to);
}

}  // namespace kmq::cpu
