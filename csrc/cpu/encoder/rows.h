// What is done to single rows of an encoder's states: normalization, softmax, sums; the same bits on every path.
#pragma once
#include <cmath>

#include "activation.h"

namespace kmq::cpu {

// to = (x + add) normalized; add may be null, `to` may be x.
KMQ_PLAIN void normalize_plain(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
  Floats sum{};
  for (int64_t i = 0; i < count; i += kWidth) {
    Floats row = load_floats(x + i, count - i);
    if (add) row += load_floats(add + i, count - i);
    sum += row;
    store_floats(to + i, row, count - i);
  }
  if (!norm.weight) return;
  const float guess = fold<Sum, float>(sum) / float(count);
  // What the guess is off by, which a row of nearly equal numbers would show: its deviations are of that size.
  Floats off{}, squares{};
  for (int64_t i = 0; i < count; i += kWidth) {
    const Floats d = load_floats(to + i, count - i, guess) - guess;
    off += d;
    squares += d * d;
  }
  const float shift = fold<Sum, float>(off) / float(count), mean = guess + shift;
  const float unshifted = fold<Sum, float>(squares) / float(count) - shift * shift, variance = unshifted < 0.0f ? 0.0f : unshifted;
  const float factor = 1.0f / std::sqrt(variance + norm.eps);
  for (int64_t i = 0; i < count; i += kWidth) {
    Floats y = (load_floats(to + i, count - i) - mean) * factor * load_floats(norm.weight + i, count - i);
    if (norm.bias) y += load_floats(norm.bias + i, count - i);
    store_floats(to + i, y, count - i);
  }
}

// The largest of count numbers (a multiple of 16), or `least`.
KMQ_PLAIN float largest_of(const float* x, int64_t count, float least) {
  Floats most = Floats{} + least;
  for (int64_t i = 0; i < count; i += kWidth) most = Larger::of(load_floats(x + i), most);
  return fold<Larger, float>(most);
}

// x = e^(x - most) for count numbers (a multiple of 16), added to `sum`.
KMQ_PLAIN void exponentials(float* x, int64_t count, float most, Floats& sum) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const Floats y = exp_of(load_floats(x + i) - most);
    store_floats(x + i, y);
    sum += y;
  }
}

inline void normalize_scalar(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
  normalize_plain(x, add, count, norm, to);
}

#ifdef KMQ_X86
KMQ_AVX2 inline void normalize_avx2(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
  normalize_plain(x, add, count, norm, to);
}

KMQ_AVX512 inline void normalize_avx512(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
  normalize_plain(x, add, count, norm, to);
}
#endif

inline void normalize(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
#ifdef KMQ_X86
  if (avx512()) return normalize_avx512(x, add, count, norm, to);
  if (avx2()) return normalize_avx2(x, add, count, norm, to);
#endif
  normalize_scalar(x, add, count, norm, to);
}

}  // namespace kmq::cpu
