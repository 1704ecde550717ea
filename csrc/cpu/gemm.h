// The fp32 matrix product of the CPU kernels: one register tile of 6 x 16, and the packing of its operands.
//
//     c [rows <= 6, cols <= width] = (or +=)  a [6, depth]  @  b [depth, width],    width 16 or 8
//
// Panels hold one step of the contraction (index k below) after the other, so that the tile reads them as streams:
//
//     A panel, 6 lanes       a(i, k) at  a[k * 6 + i]         made by pack_rows<6> or pack_cols<6>
//     B panel, width lanes   b(k, j) at  b[k * width + j]     made by pack_rows<width> or pack_cols<width>
//
// A may also stay where it is, in rows: a(i, k) at a[i * a_row + k * a_step], both template arguments (A panel: 1 and 6).
// Lanes that a tail lacks are packed as zeros; all 6 x width products are computed and only rows x cols of them are written.
//
// One tile does depth steps of 12 FMAs (width 16) on 8 loads. A B panel of 16 x 256 (16 KiB) beside an A panel of 6 x 256
// (6 KiB) stays in the first-level cache: that is kDepth, the depth by which callers cut the contraction.
// The order of additions is that of k, in each element on its own: the same for every partition of the tiles over threads.
// (Width 8 adds even and odd k apart, and the sums at the end.)
#pragma once
#include "../kmq.h"
#include "simd.h"

namespace kmq::cpu {

constexpr int kTileRows = 6;
constexpr int kTileCols = 16;
constexpr int64_t kDepth = 256;

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

template <int width, int a_row, int a_step>
void tile_scalar(int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t rows, int64_t cols, bool accumulate) {
  float tile[kTileRows * width] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int i = 0; i < kTileRows; ++i) {
      const float left = a[i * a_row + k * a_step];
      for (int j = 0; j < width; ++j) tile[i * width + j] += left * b[k * width + j];
    }
  write_corner(tile, width, c, ldc, rows, cols, accumulate);
}

#ifdef KMQ_X86

template <int width, typename T>
KMQ_AVX2 void pack_rows_avx2(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
  int64_t k = 0;
  // Eight steps at once. A step of a 6-lane panel is written as 8 floats, of which the next one overwrites 2: so one step more
  // must follow.
  for (; k + 8 + (width % 8 != 0) <= depth; k += 8) {
    for (int first = 0; first < width; first += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        r[i] = _mm256_setzero_ps();
        if (first + i < width && first + i < lanes) r[i] = load8(src + (first + i) * ld + k);
      }
      transpose8(r);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) _mm256_storeu_ps(panel + (k + i) * width + first, r[i]);
    }
  }
  pack_rows_scalar<width>(src + k, ld, lanes, depth - k, panel + k * width);
}

template <int width, typename T>
KMQ_AVX2 void pack_cols_avx2(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
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

template <int width, int a_row, int a_step>
KMQ_AVX2 void tile_avx2(int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t rows, int64_t cols,
                        bool accumulate) {
  constexpr int vectors = width / 8, chains = 2 / vectors;  // 12 independent sums, to cover the latency of an FMA
  __m256 sum[chains][kTileRows][vectors];
#pragma GCC unroll 2
  for (int chain = 0; chain < chains; ++chain)
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[chain][i][v] = _mm256_setzero_ps();

  const int64_t even = depth - depth % 2;
#pragma GCC unroll 1
  for (int64_t k = 0; k < even; k += 2) {
#pragma GCC unroll 2
    for (int step = 0; step < 2; ++step) {
      __m256 right[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) right[v] = _mm256_loadu_ps(b + step * width + 8 * v);
#pragma GCC unroll 6
      for (int i = 0; i < kTileRows; ++i) {
        const __m256 left = _mm256_broadcast_ss(a + i * a_row + step * a_step);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          sum[step % chains][i][v] = _mm256_fmadd_ps(left, right[v], sum[step % chains][i][v]);
      }
    }
    a += 2 * a_step;
    b += 2 * width;
  }
  if (depth % 2) {
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) {
      const __m256 left = _mm256_broadcast_ss(a + i * a_row);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[0][i][v] = _mm256_fmadd_ps(left, _mm256_loadu_ps(b + 8 * v), sum[0][i][v]);
    }
  }
  if (chains == 2) {
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i) sum[0][i][0] = _mm256_add_ps(sum[0][i][0], sum[chains - 1][i][0]);
  }

  if (rows < kTileRows || cols < width) {
    float tile[kTileRows * width];
#pragma GCC unroll 6
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) _mm256_storeu_ps(tile + i * width + 8 * v, sum[0][i][v]);
    write_corner(tile, width, c, ldc, rows, cols, accumulate);
    return;
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      float* out = c + i * ldc + 8 * v;
      _mm256_storeu_ps(out, accumulate ? _mm256_add_ps(_mm256_loadu_ps(out), sum[0][i][v]) : sum[0][i][v]);
    }
}

#endif  // KMQ_X86

// The functions to call: the vector form where this machine has it, else the scalar one.

template <int width, typename T>
void pack_rows(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
#ifdef KMQ_X86
  if (avx2()) return pack_rows_avx2<width>(src, ld, lanes, depth, panel);
#endif
  pack_rows_scalar<width>(src, ld, lanes, depth, panel);
}

template <int width, typename T>
void pack_cols(const T* src, int64_t ld, int64_t lanes, int64_t depth, float* panel) {
#ifdef KMQ_X86
  if (avx2()) return pack_cols_avx2<width>(src, ld, lanes, depth, panel);
#endif
  pack_cols_scalar<width>(src, ld, lanes, depth, panel);
}

template <int width = kTileCols, int a_row = 1, int a_step = kTileRows>
void gemm_tile(int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t rows, int64_t cols, bool accumulate) {
#ifdef KMQ_X86
  if (avx2()) return tile_avx2<width, a_row, a_step>(depth, a, b, c, ldc, rows, cols, accumulate);
#endif
  tile_scalar<width, a_row, a_step>(depth, a, b, c, ldc, rows, cols, accumulate);
}

}  // namespace kmq::cpu
