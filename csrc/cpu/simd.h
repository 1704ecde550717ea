// The AVX2 and AVX-512 targets of single functions, and loads that widen to fp32. Included by every kernel with a vector path.
//
// A function marked KMQ_AVX2 may be called only where kmq::cpu::avx2() is true, one marked KMQ_AVX512 only where avx512() is;
// helpers marked ..._INLINE are inlined into those. Lambdas do not inherit the target of the function around them, so kernels pass small structs instead.
#pragma once
#include "half.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define KMQ_X86 1
#define KMQ_AVX2 __attribute__((target("avx2,fma,f16c")))
#define KMQ_AVX2_INLINE __attribute__((target("avx2,fma,f16c"), always_inline)) inline
#define KMQ_AVX512_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"
#define KMQ_AVX512 __attribute__((target(KMQ_AVX512_TARGET)))
#define KMQ_AVX512_INLINE __attribute__((target(KMQ_AVX512_TARGET), always_inline)) inline

namespace kmq::cpu {

KMQ_AVX2_INLINE __m256 load8(const float* p) { return _mm256_loadu_ps(p); }

KMQ_AVX2_INLINE __m256 load8(const bf16* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

KMQ_AVX2_INLINE __m256 load8(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

KMQ_AVX2_INLINE void store8(float* p, __m256 x) { _mm256_storeu_ps(p, x); }

KMQ_AVX2_INLINE void store8(bf16* p, __m256 x) {
  const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
}

KMQ_AVX2_INLINE void store8(f16* p, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// r[i] lane j <-> r[j] lane i.
KMQ_AVX2_INLINE void transpose8(__m256 r[8]) {
  __m256 pair[8], quad[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}

}  // namespace kmq::cpu
#endif
