// The labelling pass: nearest centroids of values, as bytes or packed, and the squared errors.
//
// The midpoints form a search tree, level l of which has 2^l pivots; tables are looked up in registers. Errors are computed in
// fp64 and added lane by lane, so that every path gives the same bits.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "encode.h"
#include "kmeans.h"

namespace kmq::cpu {
namespace {

template <typename T>
void label_scalar(const Labeller& table, const T* values, const float* weight, int64_t n, uint8_t* index, double* error) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = static_cast<float>(values[i]);
    uint32_t k = 0;
    for (int level = 0; level < table.levels; ++level) k = 2 * k + (x > table.pivot[level][k]);
    index[i] = static_cast<uint8_t>(k);
    const double off = double(x) - double(table.centroid[k]);
    error[i % 8] += weight ? off * off * double(weight[i]) : off * off;
  }
}

#ifdef KMQ_X86

// Where the indices of 16 neighbouring columns go: to bytes, or into the planes of a block (see decode.h), in which a lane is an
// integer made of the fields of eight columns.
struct Bytes {};
template <int bits>
struct Planes {
  static constexpr int widths[9][3] = {{}, {1}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {4, 4}};
  static constexpr int width(int plane) { return widths[bits][plane]; }
  static constexpr int shift(int plane) { return plane == 0 ? 0 : shift(plane - 1) + width(plane - 1); }
  static constexpr int count = width(1) == 0 ? 1 : width(2) == 0 ? 2 : 3;
};

// table[k] of 2^bits entries; bits of k beyond are ignored.
template <int bits>
KMQ_AVX2_INLINE __m256 look_up(const float* table, __m256i k) {
  if constexpr (bits <= 3) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), k);
  } else if constexpr (bits <= 6) {
    const __m256 low = look_up<bits - 1>(table, k), high = look_up<bits - 1>(table + (1 << (bits - 1)), k);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(k, 32 - bits)));
  } else {
    return _mm256_i32gather_ps(table, k, 4);
  }
}

template <int level, int levels>
KMQ_AVX2_INLINE __m256i descend(const Labeller& table, __m256 x, __m256i k) {
  if constexpr (level < levels) {
    const __m256 pivot = level == 0 ? _mm256_broadcast_ss(table.pivot[0]) : look_up<level>(table.pivot[level], k);
    const __m256i right = _mm256_castps_si256(_mm256_cmp_ps(x, pivot, _CMP_GT_OQ));
    return descend<level + 1, levels>(table, x, _mm256_sub_epi32(_mm256_add_epi32(k, k), right));
  } else {
    return k;
  }
}

struct Errors4 { __m256d low, high; };

template <bool weighted>
KMQ_AVX2_INLINE __m256d squared4(__m256d sum, __m128 x, __m128 c, const float* weight) {
  const __m256d off = _mm256_sub_pd(_mm256_cvtps_pd(x), _mm256_cvtps_pd(c));
  __m256d square = _mm256_mul_pd(off, off);
  if constexpr (weighted) square = _mm256_mul_pd(square, _mm256_cvtps_pd(_mm_loadu_ps(weight)));
  return _mm256_add_pd(sum, square);
}

// Indices of 8 values.
template <typename T, int levels, bool weighted>
KMQ_AVX2_INLINE __m256i nearest8(const Labeller& table, const T* values, const float* weight, Errors4& errors) {
  const __m256 x = load8(values);
  const __m256i k = descend<0, levels>(table, x, _mm256_setzero_si256());
  const __m256 c = look_up<levels>(table.centroid, k);
  errors.low = squared4<weighted>(errors.low, _mm256_castps256_ps128(x), _mm256_castps256_ps128(c), weight);
  errors.high = squared4<weighted>(errors.high, _mm256_extractf128_ps(x, 1), _mm256_extractf128_ps(c, 1), weight + 4 * weighted);
  return k;
}

KMQ_AVX2_INLINE __m256i words16(__m256i low, __m256i high) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8); }
KMQ_AVX2_INLINE __m128i bytes16(__m256i words) {
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

template <typename T, int levels, bool weighted>
KMQ_AVX2 int64_t bytes_avx2(const Labeller& table, const T* values, const float* weight, int64_t n, uint8_t* index, double* error) {
  Errors4 errors{_mm256_loadu_pd(error), _mm256_loadu_pd(error + 4)};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i low = nearest8<T, levels, weighted>(table, values + i, weight + i * weighted, errors);
    const __m256i high = nearest8<T, levels, weighted>(table, values + i + 8, weight + (i + 8) * weighted, errors);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(index + i), bytes16(words16(low, high)));
  }
  _mm256_storeu_pd(error, errors.low);
  _mm256_storeu_pd(error + 4, errors.high);
  return i;
}

template <typename T, int bits, bool weighted>
KMQ_AVX2 int64_t blocks_avx2(const Labeller& table, const T* values, const float* weight, int64_t n, uint8_t* block, double* error) {
  using Layout = Planes<bits>;
  Errors4 errors{_mm256_loadu_pd(error), _mm256_loadu_pd(error + 4)};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    __m256i low[Layout::count] = {}, high[Layout::count] = {};
    for (int field = 0; field < 8; ++field) {
      const int64_t at = i + 16 * field;
      const __m256i k_low = nearest8<T, bits, weighted>(table, values + at, weight + at * weighted, errors);
      const __m256i k_high = nearest8<T, bits, weighted>(table, values + at + 8, weight + (at + 8) * weighted, errors);
#pragma GCC unroll 3
      for (int plane = 0; plane < Layout::count; ++plane) {
        const int width = Layout::width(plane), shift = Layout::shift(plane);
        const __m256i mask = _mm256_set1_epi32((1 << width) - 1);
        const __m128i up = _mm_cvtsi32_si128(field * width);
        low[plane] = _mm256_or_si256(low[plane], _mm256_sll_epi32(_mm256_and_si256(_mm256_srli_epi32(k_low, shift), mask), up));
        high[plane] = _mm256_or_si256(high[plane], _mm256_sll_epi32(_mm256_and_si256(_mm256_srli_epi32(k_high, shift), mask), up));
      }
    }
#pragma GCC unroll 3
    for (int plane = 0; plane < Layout::count; ++plane) {
      __m256i* to = reinterpret_cast<__m256i*>(block);
      const int width = Layout::width(plane);
      if (width == 4) {
        _mm256_storeu_si256(to, low[plane]);
        _mm256_storeu_si256(to + 1, high[plane]);
      } else if (width == 2) {
        _mm256_storeu_si256(to, words16(low[plane], high[plane]));
      } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(block), bytes16(words16(low[plane], high[plane])));
      }
      block += kLanes * width;
    }
  }
  _mm256_storeu_pd(error, errors.low);
  _mm256_storeu_pd(error + 4, errors.high);
  return i;
}

KMQ_AVX512_INLINE __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
KMQ_AVX512_INLINE __m512 load16(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
KMQ_AVX512_INLINE __m512 load16(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

template <int bits>
KMQ_AVX512_INLINE __m512 look_up(const float* table, __m512i k) {
  if constexpr (bits <= 4) {
    return _mm512_permutexvar_ps(k, _mm512_loadu_ps(table));
  } else if constexpr (bits == 5) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), k, _mm512_loadu_ps(table + 16));
  } else {
    const __m512 low = look_up<bits - 1>(table, k), high = look_up<bits - 1>(table + (1 << (bits - 1)), k);
    return _mm512_mask_mov_ps(low, _mm512_test_epi32_mask(k, _mm512_set1_epi32(1 << (bits - 1))), high);
  }
}

template <int level, int levels>
KMQ_AVX512_INLINE __m512i descend(const Labeller& table, __m512 x, __m512i k) {
  if constexpr (level < levels) {
    const __m512 pivot = level == 0 ? _mm512_set1_ps(table.pivot[0][0]) : look_up<level>(table.pivot[level], k);
    const __mmask16 right = _mm512_cmp_ps_mask(x, pivot, _CMP_GT_OQ);
    const __m512i twice = _mm512_add_epi32(k, k);
    return descend<level + 1, levels>(table, x, _mm512_mask_add_epi32(twice, right, twice, _mm512_set1_epi32(1)));
  } else {
    return k;
  }
}

template <bool weighted>
KMQ_AVX512_INLINE __m512d squared8(__m512d sum, __m256 x, __m256 c, const float* weight) {
  const __m512d off = _mm512_sub_pd(_mm512_cvtps_pd(x), _mm512_cvtps_pd(c));
  __m512d square = _mm512_mul_pd(off, off);
  if constexpr (weighted) square = _mm512_mul_pd(square, _mm512_cvtps_pd(_mm256_loadu_ps(weight)));
  return _mm512_add_pd(sum, square);
}

// Indices of 16 values.
template <typename T, int levels, bool weighted>
KMQ_AVX512_INLINE __m512i nearest16(const Labeller& table, const T* values, const float* weight, __m512d& errors) {
  const __m512 x = load16(values);
  const __m512i k = descend<0, levels>(table, x, _mm512_setzero_si512());
  const __m512 c = look_up<levels>(table.centroid, k);
  errors = squared8<weighted>(errors, _mm512_castps512_ps256(x), _mm512_castps512_ps256(c), weight);
  errors = squared8<weighted>(errors, _mm512_extractf32x8_ps(x, 1), _mm512_extractf32x8_ps(c, 1), weight + 8 * weighted);
  return k;
}

template <typename T, int levels, bool weighted>
KMQ_AVX512 int64_t bytes_avx512(const Labeller& table, const T* values, const float* weight, int64_t n, uint8_t* index, double* error) {
  __m512d errors = _mm512_loadu_pd(error);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(index + i),
                     _mm512_cvtepi32_epi8(nearest16<T, levels, weighted>(table, values + i, weight + i * weighted, errors)));
  _mm512_storeu_pd(error, errors);
  return i;
}

template <typename T, int bits, bool weighted>
KMQ_AVX512 int64_t blocks_avx512(const Labeller& table, const T* values, const float* weight, int64_t n, uint8_t* block, double* error) {
  using Layout = Planes<bits>;
  __m512d errors = _mm512_loadu_pd(error);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    __m512i planes[Layout::count] = {};
#pragma GCC unroll 8
    for (int field = 0; field < 8; ++field) {
      const int64_t at = i + 16 * field;
      const __m512i k = nearest16<T, bits, weighted>(table, values + at, weight + at * weighted, errors);
#pragma GCC unroll 3
      for (int plane = 0; plane < Layout::count; ++plane) {
        const int width = Layout::width(plane), shift = Layout::shift(plane);
        const __m512i part = Layout::count == 1 ? k : _mm512_and_si512(_mm512_srli_epi32(k, shift), _mm512_set1_epi32((1 << width) - 1));
        planes[plane] = _mm512_or_si512(planes[plane], _mm512_slli_epi32(part, field * width));
      }
    }
#pragma GCC unroll 3
    for (int plane = 0; plane < Layout::count; ++plane) {
      const int width = Layout::width(plane);
      if (width == 4) _mm512_storeu_si512(block, planes[plane]);
      else if (width == 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(block), _mm512_cvtepi32_epi16(planes[plane]));
      else _mm_storeu_si128(reinterpret_cast<__m128i*>(block), _mm512_cvtepi32_epi8(planes[plane]));
      block += kLanes * width;
    }
  }
  _mm512_storeu_pd(error, errors);
  return i;
}

#endif

// As many values as the vector path takes, from the first on; returns their number. `out` are bytes or blocks.
template <typename T>
int64_t label_path(const Labeller& table, const T* values, const float* weight, int64_t n, bool packed, uint8_t* out, double* error) {
#ifdef KMQ_X86
  if (avx2()) {
    int64_t done = 0;
    with_small(table.levels, [&](auto constant) {
      constexpr int levels = constant();
      const auto run = [&](auto weighted) {
        if (avx512())
          done = packed ? blocks_avx512<T, levels, weighted()>(table, values, weight, n, out, error)
                        : bytes_avx512<T, levels, weighted()>(table, values, weight, n, out, error);
        else
          done = packed ? blocks_avx2<T, levels, weighted()>(table, values, weight, n, out, error)
                        : bytes_avx2<T, levels, weighted()>(table, values, weight, n, out, error);
      };
      if (weight) run(std::true_type());
      else run(std::false_type());
    });
    return done;
  }
#endif
  return 0;
}

template <typename T>
void label(const Labeller& table, const T* values, const float* weight, int64_t n, int bits, uint8_t* out, double* error) {
  int64_t i = label_path(table, values, weight, n, bits > 0, out, error);
  if (bits == 0) return label_scalar(table, values + i, weight ? weight + i : nullptr, n - i, out + i, error);
  for (out += i / kBlock * kLanes * bits; i < n; i += kBlock, out += kLanes * bits) {
    const int64_t count = std::min(kBlock, n - i);
    if (avx2()) {  // a short block is filled up with the first centroid, whose index and error are zero
      float block[kBlock], block_weight[kBlock] = {};
      std::fill(block, block + kBlock, table.centroid[0]);
      for (int64_t j = 0; j < count; ++j) block[j] = static_cast<float>(values[i + j]);
      if (weight) std::copy(weight + i, weight + i + count, block_weight);
      label_path(table, block, weight ? block_weight : nullptr, kBlock, true, out, error);
    } else {
      uint8_t index[kBlock] = {};
      label_scalar(table, values + i, weight ? weight + i : nullptr, count, index, error);
      encode_block(index, bits, out);
    }
  }
}

}  // namespace

Labeller::Labeller(const float* midpoints, const float* centroids, int num_centroids) : levels(1) {
  constexpr int kWhole = 16;  // whole registers are read
  while ((1 << levels) < num_centroids) ++levels;
  for (int level = 0; level < levels; ++level)
    for (int k = 0; k < std::max(1 << level, kWhole); ++k) {
      const int m = ((2 * k + 1) << (levels - 1 - level)) - 1;
      pivot[level][k] = m < num_centroids - 1 ? midpoints[m] : HUGE_VALF;
    }
  for (int k = 0; k < std::max(1 << levels, kWhole); ++k) centroid[k] = centroids[std::min(k, num_centroids - 1)];
}

void Labeller::run(const void* values, Dtype dtype, const float* weight, int64_t n, int bits, uint8_t* out, double* error) const {
  if (dtype == Dtype::f32) label(*this, static_cast<const float*>(values), weight, n, bits, out, error);
  else if (dtype == Dtype::bf16) label(*this, static_cast<const bf16*>(values), weight, n, bits, out, error);
  else label(*this, static_cast<const f16*>(values), weight, n, bits, out, error);
}

}  // namespace kmq::cpu
