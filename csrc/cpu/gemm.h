// The fp32 matrix product of the CPU kernels: register tiles, and the packing of their operands.
//
//     c [min(rows, R), min(cols, W)] = (or +=)  a [R, depth]  @  b [depth, W]
//
// A path has tiles of two shapes with the same number of sums, the full one and, for a tail of few columns, one of twice the
// rows and half the columns:
//
//     GemmScalar, GemmAvx2   6 x 16 and 12 x  8      12 sums of 8, beside 2 (1) registers of b and one of a: 15 of 16 registers
//     GemmAvx512            12 x 32 and 24 x 16      24 sums of 16, beside 2 (1) registers of b and one of a: 27 of 32
//
// The right operand is packed in panels, which hold one step of the contraction (index k below) after the other, so that the
// tile reads them as a stream:
//
//     B panel, W lanes       b(k, j) at  b[k * W + j]                made by pack_rows<W> or pack_cols<W>
//
// The left operand is read one number at a time, a(i, k) at a[i * a_row + k * a_step], both template arguments: rows as they
// are (a_step 1), or a panel (a_row 1, a_step R) made by pack_cols<R>.
// Lanes that a tail lacks are packed as zeros; all R x W products are computed and only those asked for are written.
//
// One step of a full tile is 12 (24) FMAs on 8 (14) loads, which leaves the FMA units the only bottleneck. A B panel of
// 16 x 256 (16 KiB; AVX-512: 32 x 256, 32 KiB) stays in the first-level cache: that is kDepth, the depth by which callers cut
// the contraction. Panels begin at multiples of 64 bytes: a vector that straddles two cache lines costs two loads.
// The order of additions is that of k, in each element on its own: the same for every partition of the tiles over threads.
#pragma once
#include <algorithm>
#include <memory>
#include <new>

#include "../kmq.h"
#include "simd.h"

namespace kmq::cpu {

constexpr int64_t kDepth = 256;

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<float[], FreeAligned>;

// Uninitialised floats from a multiple of 64 bytes on.
inline Scratch scratch(int64_t size) { return Scratch(static_cast<float*>(::operator new[](size * sizeof(float), std::align_val_t(64)))); }

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

// Writes the rows x cols corner of a full tile.
inline void write_corner(const float* tile, int width, float* c, int64_t ldc, int64_t rows, int64_t cols, bool accumulate) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) c[i * ldc + j] = tile[i * width + j] + (accumulate ? c[i * ldc + j] : 0.0f);
}

struct GemmScalar {
  static constexpr int kRows = 6, kCols = 16;

  template <int width, typename T>
  static void pack_rows(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
    pack_rows_scalar<width>(src, ld, lanes, depth, panel);
  }

  template <int width, typename T>
  static void pack_cols(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
    pack_cols_scalar<width>(src, ld, lanes, depth, panel);
  }

  template <int R, int W, int a_row, int a_step>
  static void tile(int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t rows, int64_t cols, bool accumulate) {
    float sum[R * W] = {};
    for (int64_t k = 0; k < depth; ++k)
      for (int i = 0; i < R; ++i) {
        const float left = a[i * a_row + k * a_step];
        for (int j = 0; j < W; ++j) sum[i * W + j] += left * b[k * W + j];
      }
    write_corner(sum, W, c, ldc, std::min<int64_t>(rows, R), std::min<int64_t>(cols, W), accumulate);
  }
};

#ifdef KMQ_X86

struct GemmAvx2 {
  static constexpr int kRows = 6, kCols = 16;

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

  template <int R, int W, int a_row, int a_step>
  KMQ_AVX2 static void tile(int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t rows, int64_t cols,
                            bool accumulate) {
    constexpr int vectors = W / 8;
    __m256 sum[R][vectors];
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[i][v] = _mm256_setzero_ps();

#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += W) {
      __m256 right[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) right[v] = _mm256_loadu_ps(b + 8 * v);
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        const __m256 left = _mm256_broadcast_ss(a + i * a_row);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sum[i][v] = _mm256_fmadd_ps(left, right[v], sum[i][v]);
      }
    }

    if (rows < R || cols < W) {
      float tile[R * W];
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) _mm256_storeu_ps(tile + i * W + 8 * v, sum[i][v]);
      write_corner(tile, W, c, ldc, std::min<int64_t>(rows, R), std::min<int64_t>(cols, W), accumulate);
      return;
    }
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        float* out = c + i * ldc + 8 * v;
        _mm256_storeu_ps(out, accumulate ? _mm256_add_ps(_mm256_loadu_ps(out), sum[i][v]) : sum[i][v]);
      }
  }
};

struct GemmAvx512 {
  static constexpr int kRows = 12, kCols = 32;

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

  template <int R, int W, int a_row, int a_step>
  KMQ_AVX512 static void tile(int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t rows, int64_t cols,
                              bool accumulate) {
    constexpr int vectors = W / 16;
    __m512 sum[R][vectors];
#pragma GCC unroll 24
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[i][v] = _mm512_setzero_ps();

#pragma GCC unroll 1
    for (int64_t k = 0; k < depth; ++k, a += a_step, b += W) {
      __m512 right[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) right[v] = _mm512_loadu_ps(b + 16 * v);
#pragma GCC unroll 24
      for (int i = 0; i < R; ++i) {
        const __m512 left = _mm512_set1_ps(a[i * a_row]);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sum[i][v] = _mm512_fmadd_ps(left, right[v], sum[i][v]);
      }
    }

    __mmask16 mask[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) mask[v] = first_lanes(std::clamp<int64_t>(cols - 16 * v, 0, 16));
#pragma GCC unroll 24
    for (int i = 0; i < R; ++i)
      if (i < rows)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
          float* out = c + i * ldc + 16 * v;
          if (accumulate) sum[i][v] = _mm512_add_ps(_mm512_maskz_loadu_ps(mask[v], out), sum[i][v]);
          _mm512_mask_storeu_ps(out, mask[v], sum[i][v]);
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
