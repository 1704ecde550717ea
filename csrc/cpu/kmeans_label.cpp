// The labelling pass: nearest centroids of values, and the squared errors.
//
// The midpoints form a search tree, level l of which has 2^l pivots; up to 8 pivots sit in one register. Errors are computed in
// fp64 and added lane by lane, so that the scalar path gives the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "kmeans.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kmq::cpu {
namespace {

template <typename T>
void run_scalar(const Labeller& table, const T* values, const float* weight, int64_t begin, int64_t n, uint8_t* index, double* error) {
  for (int64_t i = begin; i < n; ++i) {
    const float x = static_cast<float>(values[i]);
    uint32_t k = 0;
    for (int level = 0; level < table.levels; ++level) k = 2 * k + (x > table.pivot[level][k]);
    index[i] = static_cast<uint8_t>(k);
    const double off = double(x) - double(table.centroid[k]);
    error[i % 8] += weight ? off * off * double(weight[i]) : off * off;
  }
}

#if defined(__x86_64__)
#define KMQ_AVX2 __attribute__((target("avx2,f16c"))) inline

KMQ_AVX2 __m256 load8(const float* values) { return _mm256_loadu_ps(values); }
KMQ_AVX2 __m256 load8(const bf16* values) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
KMQ_AVX2 __m256 load8(const f16* values) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values))); }

// table[k] of 2^bits entries.
template <int bits>
KMQ_AVX2 __m256 look_up(const float* table, __m256i k) {
  if constexpr (bits <= 3) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), k);
  } else if constexpr (bits == 4) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), k), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), k);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(k, 28)));
  } else {
    return _mm256_i32gather_ps(table, k, 4);
  }
}

template <int level, int levels>
KMQ_AVX2 __m256i descend(const Labeller& table, __m256 x, __m256i k) {
  if constexpr (level < levels) {
    const __m256 pivot = look_up<level>(table.pivot[level], k);
    const __m256i right = _mm256_castps_si256(_mm256_cmp_ps(x, pivot, _CMP_GT_OQ));
    return descend<level + 1, levels>(table, x, _mm256_sub_epi32(_mm256_add_epi32(k, k), right));
  } else {
    return k;
  }
}

template <bool weighted>
KMQ_AVX2 __m256d squared(__m256d sum, __m128 x, __m128 c, const float* weight, int64_t at) {
  const __m256d off = _mm256_sub_pd(_mm256_cvtps_pd(x), _mm256_cvtps_pd(c));
  __m256d square = _mm256_mul_pd(off, off);
  if constexpr (weighted) square = _mm256_mul_pd(square, _mm256_cvtps_pd(_mm_loadu_ps(weight + at)));
  return _mm256_add_pd(sum, square);
}

template <typename T, int levels, bool weighted>
__attribute__((target("avx2,f16c"))) void run_avx2(const Labeller& table, const T* values, const float* weight, int64_t n, uint8_t* index,
                                                   double* error) {
  __m256d low = _mm256_loadu_pd(error), high = _mm256_loadu_pd(error + 4);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256i k[4];
    for (int part = 0; part < 4; ++part) {
      const int64_t at = i + 8 * part;
      const __m256 x = load8(values + at);
      k[part] = descend<0, levels>(table, x, _mm256_setzero_si256());
      const __m256 c = look_up<levels>(table.centroid, k[part]);
      low = squared<weighted>(low, _mm256_castps256_ps128(x), _mm256_castps256_ps128(c), weight, at);
      high = squared<weighted>(high, _mm256_extractf128_ps(x, 1), _mm256_extractf128_ps(c, 1), weight, at + 4);
    }
    const __m256i words = _mm256_packus_epi16(_mm256_packs_epi32(k[0], k[1]), _mm256_packs_epi32(k[2], k[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + i), _mm256_permutevar8x32_epi32(words, order));
  }
  _mm256_storeu_pd(error, low);
  _mm256_storeu_pd(error + 4, high);
  run_scalar(table, values, weight, i, n, index, error);
}

template <typename T, int levels>
void run_levels(const Labeller& table, const T* values, const float* weight, int64_t n, uint8_t* index, double* error) {
  if (levels != table.levels) {
    if constexpr (levels < 8) run_levels<T, levels + 1>(table, values, weight, n, index, error);
  } else if (weight) {
    run_avx2<T, levels, true>(table, values, weight, n, index, error);
  } else {
    run_avx2<T, levels, false>(table, values, nullptr, n, index, error);
  }
}
#endif

template <typename T>
void run_path(const Labeller& table, const T* values, const float* weight, int64_t n, uint8_t* index, double* error) {
#if defined(__x86_64__)
  if (avx2()) return run_levels<T, 1>(table, values, weight, n, index, error);
#endif
  run_scalar(table, values, weight, 0, n, index, error);
}

}  // namespace

Labeller::Labeller(const float* midpoints, const float* centroids, int num_centroids) : levels(1) {
  while ((1 << levels) < num_centroids) ++levels;
  for (int level = 0; level < levels; ++level)
    for (int k = 0; k < 128; ++k) {
      const int64_t m = (int64_t(2 * k + 1) << (levels - 1 - level)) - 1;
      pivot[level][k] = k < (1 << level) && m < num_centroids - 1 ? midpoints[m] : HUGE_VALF;
    }
  for (int k = 0; k < 256; ++k) centroid[k] = centroids[std::min(k, num_centroids - 1)];
}

void Labeller::run(const void* values, Dtype dtype, const float* weight, int64_t n, uint8_t* index, double* error) const {
  if (dtype == Dtype::f32) run_path(*this, static_cast<const float*>(values), weight, n, index, error);
  else if (dtype == Dtype::bf16) run_path(*this, static_cast<const bf16*>(values), weight, n, index, error);
  else run_path(*this, static_cast<const f16*>(values), weight, n, index, error);
}

}  // namespace kmq::cpu
