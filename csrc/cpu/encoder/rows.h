// What is done to single rows of an encoder's states: normalization, softmax, sums. Sums run in 16 lanes, in the same order on every
// path; the compiler vectorizes them.
#pragma once
#include <algorithm>
#include <cmath>

#include "activation.h"

namespace kmq::cpu {

constexpr int64_t kSumLanes = 16;

KMQ_PLAIN float sum_of_lanes(const float* lanes) {
  float total = 0;
  for (int64_t l = 0; l < kSumLanes; ++l) total += lanes[l];
  return total;
}

// to = (x + add) normalized; add may be null, `to` may be x.
KMQ_PLAIN void normalize_plain(const float* x, const float* add, int64_t count, const Norm& norm, float* to) {
  float lanes[kSumLanes] = {};
  int64_t i = 0;
  if (add) {
    for (i = 0; i < count; ++i) to[i] = x[i] + add[i];
  } else if (to != x) {
    for (i = 0; i < count; ++i) to[i] = x[i];
  }
  if (!norm.weight) return;
  for (i = 0; i + kSumLanes <= count; i += kSumLanes)
    for (int64_t l = 0; l < kSumLanes; ++l) lanes[l] += to[i + l];
  for (int64_t l = 0; i + l < count; ++l) lanes[l] += to[i + l];
  const float guess = sum_of_lanes(lanes) / float(count);
  // What the guess is off by, which a row of nearly equal numbers would show: its deviations are of that size.
  float off[kSumLanes] = {};
  for (int64_t l = 0; l < kSumLanes; ++l) lanes[l] = 0;
  for (i = 0; i + kSumLanes <= count; i += kSumLanes)
    for (int64_t l = 0; l < kSumLanes; ++l) {
      const float d = to[i + l] - guess;
      off[l] += d;
      lanes[l] += d * d;
    }
  for (int64_t l = 0; i + l < count; ++l) {
    const float d = to[i + l] - guess;
    off[l] += d;
    lanes[l] += d * d;
  }
  const float shift = sum_of_lanes(off) / float(count), mean = guess + shift;
  const float variance = std::max(0.0f, sum_of_lanes(lanes) / float(count) - shift * shift);
  const float factor = 1.0f / std::sqrt(variance + norm.eps);
  if (norm.bias) {
    for (i = 0; i < count; ++i) to[i] = (to[i] - mean) * factor * norm.weight[i] + norm.bias[i];
  } else {
    for (i = 0; i < count; ++i) to[i] = (to[i] - mean) * factor * norm.weight[i];
  }
}

// The largest of count numbers (a multiple of 16), or `least`.
KMQ_PLAIN float largest_of(const float* x, int64_t count, float least) {
  float lanes[kSumLanes];
  for (int64_t l = 0; l < kSumLanes; ++l) lanes[l] = least;
  for (int64_t i = 0; i < count; i += kSumLanes)
    for (int64_t l = 0; l < kSumLanes; ++l) lanes[l] = lanes[l] < x[i + l] ? x[i + l] : lanes[l];
  for (int64_t l = 1; l < kSumLanes; ++l) lanes[0] = lanes[0] < lanes[l] ? lanes[l] : lanes[0];
  return lanes[0];
}

// x = e^(x - most) for count numbers (a multiple of 16), added to 16 lanes.
KMQ_PLAIN void exponentials(float* x, int64_t count, float most, float* lanes) {
  for (int64_t i = 0; i < count; i += kSumLanes)
    for (int64_t l = 0; l < kSumLanes; ++l) {
      x[i + l] = exp_of(x[i + l] - most);
      lanes[l] += x[i + l];
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
