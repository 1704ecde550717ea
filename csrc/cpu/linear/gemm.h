// The fp32 matrix product of the CPU kernels: register tiles, and the packing of their operands.
//
//     c [rows, min(cols, W)] = (or +=)  a [rows, depth]  @  b [depth, W]  (+ bias [W])
//
// W is kCols of a path, rows at most its kRows:
//
//     GemmScalar, GemmAvx2    6 x 16    12 sums of 8, beside 2 registers of b and one of a: 15 of 16 registers
//     GemmAvx512             12 x 32    24 sums of 16, beside 2 registers of b and one of a: 27 of 32
//
// The right operand is packed in panels, which hold one step of the contraction (index k below) after the other, so that the
// tile reads them as a stream:
//
//     B panel    b(k, j) at  b[k * W + j]                made by pack_rows<W> or pack_cols<W>
//
// The left operand is read one number at a time, a(i, k) at a[i * a_row + k * a_step], both template arguments: rows as they
// are (a_step 1), or a panel (a_row 1, a_step kRows) made by pack_cols<kRows>. Rows beyond `rows` may be read, up to a multiple
// of 4 (GemmScalar: of 6; GemmAvx2: to 4 or 6), but not used.
// Lanes that a tail lacks are packed as zeros.
//
// One step of a full tile is 12 (24) FMAs on 8 (14) loads, which leaves the FMA units the only bottleneck. Callers cut the
// contraction to kDepth and the columns to kWide: a left strip of kRows x kDepth (6 KiB; AVX-512: 18 KiB) stays in the first-level
// cache while the panels of a kDepth x kWide block stream from the second (256 KiB, half of what a processor without AVX-512 may
// have; 576 KiB). Panels begin at multiples of 64 bytes: a vector that straddles two cache lines costs two loads.
// The order of additions is that of k, in each element on its own: the same for every partition of the tiles over threads.
#pragma once
#include <algorithm>
#include <memory>
#include <new>

#include "../../kmq.h"
#include "../simd.h"

namespace kmq::cpu {

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<float[], FreeAligned>;

// Uninitialised floats from a multiple of 64 bytes on.
inline Scratch scratch(int64_t size) { return Scratch(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t(64)))); }

// Floats of this thread from a multiple of 64 bytes on, kept for its next call: fresh memory would cost a page fault every 4 KiB. So
// `size` must be bounded whatever the number of rows: callers work in strips.
inline float* workspace(int64_t size) {
  static thread_local Scratch kept;
  static thread_local int64_t kept_size = 0;
  if (size > kept_size) {
    kept.reset();
    kept_size = 0;  // noted before what may throw: the next call must not take memory for there that is not
    kept = scratch(size);
    kept_size = size;
  }
  return kept.get();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// panel[k * width + i] = src(i, k) = src[i * ld + k] for i < lanes (the source holds lanes as rows), 0 for the other lanes.
template <int width, typename T>
void pack_rows_scalar(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t i = 0; i < width; ++i) panel[k * width + i] = i < lanes ? static_cast<float>(src[i * ld + k]) : 0.0f;
}

// panel[k * width + i] = src(i, k) = src[k * ld + i] for i < lanes (the source holds lanes as columns), 0 for the other lanes.
template <int width, typename T>
void pack_cols_scalar(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t i = 0; i < width; ++i) panel[k * width + i] = i < lanes ? static_cast<float>(src[k * ld + i]) : 0.0f;
}

struct GemmScalar {
  static constexpr int kRows = 6, kCols = 16;
  static constexpr int64_t kDepth = 256, kWide = 256;

  template <int width, typename T>
  static void pack_rows(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
    pack_rows_scalar<width>(src, ld, lanes, depth, panel);
  }

  template <int width, typename T>
  static void pack_cols(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
    pack_cols_scalar<width>(src, ld, lanes, depth, panel);
  }

  // Rows of the next tile where `left` remain.
  static int64_t rows_of_next(int64_t left) { return std::min<int64_t>(kRows, left); }

  template <int a_row, int a_step>
  static void tile(int64_t rows, int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t cols,
                   const float* bias, bool accumulate) {
    float sum[kRows * kCols] = {};
    for (int64_t k = 0; k < depth; ++k)
      for (int i = 0; i < kRows; ++i) {
        const float left = a[i * a_row + k * a_step];
        for (int j = 0; j < kCols; ++j) sum[i * kCols + j] += left * b[k * kCols + j];
      }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < std::min<int64_t>(cols, kCols); ++j) {
        float& out = c[i * ldc + j];
        out = sum[i * kCols + j] + (accumulate ? out : bias ? bias[j] : 0.0f);
      }
  }
};

#ifdef KMQ_X86

struct GemmAvx2 {
  static constexpr int kRows = 6, kCols = 16;
  static constexpr int64_t kDepth = 256, kWide = 256;

  template <int width, typename T>
  KMQ_AVX2 static void pack_rows(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
    static_assert(width % 8 == 0);
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8)
      for (int first = 0; first < width; first += 8) {
        __m256 r[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          r[i] = _mm256_setzero_ps();
          if (first + i < lanes) r[i] = load8(src + (first + i) * ld + k);
        }
        transpose8(r);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) _mm256_storeu_ps(panel + (k + i) * width + first, r[i]);
      }
    pack_rows_scalar<width>(src + k, ld, lanes, depth - k, panel + k * width);
  }

  template <int width, typename T>
  KMQ_AVX2 static void pack_cols(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
    int64_t k = 0;
    if (lanes == width) {
      // A step of 6 is read and written as 8, the next one overwrites 2: so one step more must follow, in both.
      const int64_t vector_depth = width % 8 == 0 ? depth : ld >= 8 ? depth - 1 : 0;
      for (; k < vector_depth; ++k)
        for (int first = 0; first < width; first += 8)
          _mm256_storeu_ps(panel + k * width + first, load8(src + k * ld + first));
    }
    pack_cols_scalar<width>(src + k * ld, ld, lanes, depth - k, panel + k * width);
  }

  // 4 rows keep the FMA units as busy as 6 (8 sums, an FMA takes 4 cycles, there are two units), fewer do not.
  static int64_t rows_of_next(int64_t left) { return left >= 9 || left == 6 || left == 5 ? std::min<int64_t>(6, left) : std::min<int64_t>(4, left); }

  template <int a_row, int a_step>
  static void tile(int64_t rows, int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t cols,
                   const float* bias, bool accumulate) {
    if (rows > 4) tile_of<6, a_row, a_step>(rows, depth, a, b, c, ldc, cols, bias, accumulate);
    else tile_of<4, a_row, a_step>(rows, depth, a, b, c, ldc, cols, bias, accumulate);
  }

  template <int R, int a_row, int a_step>
  KMQ_AVX2 static void tile_of(int64_t rows, int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t cols,
                               const float* bias, bool accumulate) {
    __m256 sum[R][2];
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      if (i < rows) _mm_prefetch(reinterpret_cast<const char*>(c + i * ldc), _MM_HINT_T0);
      sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    }
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += kCols) {
      const __m256 right[2] = {_mm256_loadu_ps(b), _mm256_loadu_ps(b + 8)};
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        const __m256 left = _mm256_broadcast_ss(a + i * a_row);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sum[i][v] = _mm256_fmadd_ps(left, right[v], sum[i][v]);
      }
    }

    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(std::clamp<int64_t>(cols - 8 * v, 0, 8))), lane);
      const __m256 add = bias ? _mm256_maskload_ps(bias + 8 * v, mask) : _mm256_setzero_ps();
#pragma GCC unroll 6
      for (int i = 0; i < R; ++i) {
        if (i >= rows) continue;
        float* out = c + i * ldc + 8 * v;
        _mm256_maskstore_ps(out, mask, _mm256_add_ps(sum[i][v], accumulate ? _mm256_maskload_ps(out, mask) : add));
      }
    }
  }
};

struct GemmAvx512 {
  static constexpr int kRows = 12, kCols = 32;
  static constexpr int64_t kDepth = 384, kWide = 384;

  template <int width, typename T>
  KMQ_AVX512 static void pack_rows(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
    static_assert(width % 16 == 0);
    for (int64_t k = 0; k < depth; k += 16) {
      const int64_t steps = std::min<int64_t>(16, depth - k);
      const __mmask16 mask = first_lanes(steps);
      for (int first = 0; first < width; first += 16) {
        __m512 r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) r[i] = load16(src + (first + i) * ld + k, first + i < lanes ? mask : __mmask16(0));
        transpose16(r);
        float* to = panel + k * width + first;
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (i < steps) _mm512_storeu_ps(to + i * width, r[i]);
      }
    }
  }

  template <int width, typename T>
  KMQ_AVX512 static void pack_cols(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
    for (int first = 0; first < width; first += 16) {
      const __mmask16 there = first_lanes(std::clamp<int64_t>(lanes - first, 0, 16)), written = first_lanes(width - first);
      for (int64_t k = 0; k < depth; ++k)
        _mm512_mask_storeu_ps(panel + k * width + first, written, load16(src + k * ld + first, there));
    }
  }

  // 4 rows keep the FMA units as busy as 12 (8 sums, an FMA takes 4 cycles, there are two units), fewer do not.
  static int64_t rows_of_next(int64_t left) { return std::min<int64_t>(12, left); }

  template <int a_row, int a_step>
  static void tile(int64_t rows, int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t cols,
                   const float* bias, bool accumulate) {
    if (rows > 8) tile_of<12, a_row, a_step>(rows, depth, a, b, c, ldc, cols, bias, accumulate);
    else if (rows > 4) tile_of<8, a_row, a_step>(rows, depth, a, b, c, ldc, cols, bias, accumulate);
    else tile_of<4, a_row, a_step>(rows, depth, a, b, c, ldc, cols, bias, accumulate);
  }

  template <int R, int a_row, int a_step>
  KMQ_AVX512 static void tile_of(int64_t rows, int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t cols,
                                 const float* bias, bool accumulate) {
    __m512 sum[R][2];
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      if (i < rows) _mm_prefetch(reinterpret_cast<const char*>(c + i * ldc), _MM_HINT_T0);
      if (i < rows) _mm_prefetch(reinterpret_cast<const char*>(c + i * ldc + 16), _MM_HINT_T0);
      sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    }
#pragma GCC unroll 1
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += kCols) {
      const __m512 right[2] = {_mm512_loadu_ps(b), _mm512_loadu_ps(b + 16)};
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        const __m512 left = _mm512_set1_ps(a[i * a_row]);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sum[i][v] = _mm512_fmadd_ps(left, right[v], sum[i][v]);
      }
    }

#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __mmask16 mask = first_lanes(std::clamp<int64_t>(cols - 16 * v, 0, 16));
      const __m512 add = bias ? _mm512_maskz_loadu_ps(mask, bias + 16 * v) : _mm512_setzero_ps();
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        if (i >= rows) continue;
        float* out = c + i * ldc + 16 * v;
        _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(sum[i][v], accumulate ? _mm512_maskz_loadu_ps(mask, out) : add));
      }
    }
  }
};

#endif  // KMQ_X86

// Calls f with the tiles of this machine.
template <typename F>
void with_gemm(const F& f) {
#ifdef KMQ_X86
  if (avx512()) return f(GemmAvx512{});
  if (avx2()) return f(GemmAvx2{});
#endif
  f(GemmScalar{});
}

}  // namespace kmq::cpu
