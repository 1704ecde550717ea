// The AVX2 and AVX-512 targets of single functions, and loads that widen to fp32. Included by every kernel with a vector path.
//
// A function marked KMQ_AVX2 may be called only where kmq::cpu::avx2() is true, one marked KMQ_AVX512 only where avx512() is, one marked KMQ_VNNI only where vnni() is;
// helpers marked ..._INLINE are inlined into those. Lambdas do not inherit the target of the function around them, so kernels pass small structs instead.
//
// Twins for AVX2 and AVX-512 are written out, here and in codes/decode_*.h, linear/, clustering/ and gradients/, where they differ in
// more than their width: masks are registers of their own in one and vectors in the other, tables of 16 to 64 entries are one
// instruction or a tree of them, tails are masked or padded, and what is unrolled follows from 32 registers or 16. A template over a
// vector type would have to name each of these differences. What is alike for all paths is a plain loop (KMQ_PLAIN), or a template
// over the path (GemmAvx2 and GemmAvx512, DotAvx2 and DotAvx512).
#pragma once
#include "half.h"

// A plain loop that the compiler vectorizes: inlined into a function for each path, it is compiled for that path.
#define KMQ_PLAIN __attribute__((always_inline)) inline

#if defined(__x86_64__)
// GCC's own header warns of the values that its intrinsics leave undefined on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define KMQ_X86 1
#define KMQ_AVX2 __attribute__((target("avx2,fma,f16c")))
#define KMQ_AVX2_INLINE __attribute__((target("avx2,fma,f16c"), always_inline)) inline
#define KMQ_AVX512_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"
#define KMQ_AVX512 __attribute__((target(KMQ_AVX512_TARGET)))
#define KMQ_AVX512_INLINE __attribute__((target(KMQ_AVX512_TARGET), always_inline)) inline
#define KMQ_VNNI __attribute__((target(KMQ_AVX512_TARGET ",avx512vnni,avx512vbmi")))
#define KMQ_VNNI_INLINE __attribute__((target(KMQ_AVX512_TARGET ",avx512vnni,avx512vbmi"), always_inline)) inline

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

KMQ_AVX512_INLINE __mmask16 first_lanes(int64_t count) { return count >= 16 ? __mmask16(0xffff) : __mmask16((1u << count) - 1); }

// The lanes of `mask` from p, zeros elsewhere; nothing else is read.
KMQ_AVX512_INLINE __m512 load16(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }

KMQ_AVX512_INLINE __m512 load16(const bf16* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

KMQ_AVX512_INLINE __m512 load16(const f16* p, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)); }

KMQ_AVX512_INLINE void store16(float* p, __m512 x, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, x); }

KMQ_AVX512_INLINE void store16(bf16* p, __m512 x, __mmask16 mask) {
  const __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  const __m512i wide = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(wide));
}

KMQ_AVX512_INLINE void store16(f16* p, __m512 x, __mmask16 mask) {
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// r[i] lane j <-> r[j] lane i.
KMQ_AVX512_INLINE void transpose16(__m512 r[16]) {
  __m512 pair[16], quad[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    pair[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  // Lane l of quad[4 g + c] holds, of column 4 l + c, the rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0x88), odd_low = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0xdd);
    r[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    r[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    r[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    r[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}

}  // namespace kmq::cpu
#endif
