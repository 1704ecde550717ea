// The linear layer on packed weights. Which way is taken depends on M, the rows of the input:
//
//   small M   every packed row is decoded in registers and multiplied with up to kFusedRows input rows at once
//   else      kBlockRows packed rows x kDepth columns are decoded into the second-level cache and multiplied by gemm_tile
//
// Both cut OUT into blocks of kBlockRows rows, and the order of additions within a block depends on M and IN alone, so the
// result is the same for any number of threads.
#include <memory>
#include <vector>

#include "decode.h"
#include "gemm.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kBlockRows = 48;
constexpr int64_t kChunkM = 512;      // rows of the input that share one decoded block
constexpr int64_t kStripLd = kDepth + 16;  // of decoded rows: rows of one tile in different cache sets
constexpr int64_t kFewPanels = 4;
constexpr int64_t kGrainWork = 1 << 19;  // multiplications (a decoded weight counts as 8) that are worth a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

std::unique_ptr<float[]> scratch(int64_t size) { return std::unique_ptr<float[]>(new float[size]); }

template <typename F>
void with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) f(float{});
  else if (dtype == Dtype::bf16) f(bf16{});
  else f(f16{});
}

template <typename T>
void widen(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

#ifdef KMQ_X86

constexpr int kFusedRows = 8;
constexpr int64_t kPrefetch = 1024;  // bytes of packed rows
constexpr int64_t kFusedInput = 6144;  // floats of input that stay in the first-level cache beside the packed row

// Adds weights * input to M sums; the input is interleaved by groups of 8 columns: [cols / 8][M][8].
template <int M>
struct Dot {
  static constexpr int kChains = M == 1 ? 4 : M <= 4 ? 2 : 1;
  const float* input;
  __m256 sum[kChains][M];
  KMQ_AVX2_INLINE void operator()(int column, int chain, __m256 weights) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      __m256& to = sum[chain % kChains][m];
      to = _mm256_fmadd_ps(weights, _mm256_loadu_ps(input + column * M + 8 * m), to);
    }
  }
};

KMQ_AVX2_INLINE float horizontal_sum(__m256 x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// sums[(row - begin) * M + m] (+)= dot of the packed row and row m of the interleaved input, over columns [first_col, first_col + cols).
template <int bits, int M>
KMQ_AVX2 void dot_rows(const Packed& packed, const float* codebook, int64_t group_rows, const Region& region, const float* input,
                       float* sums, bool accumulate) {
  const int64_t row_bytes = packed.row_bytes();
  const float* book = nullptr;
  Decoder<bits> decoder{};
  for (int64_t i = 0; i < region.rows; ++i) {
    const int64_t row = region.begin + i;
    const float* row_book = codebook + ((row / group_rows) << bits);
    if (row_book != book) decoder.load(book = row_book);
    const uint8_t* block = packed.data + row * row_bytes + region.first_col / kBlock * (kLanes * bits);
    Dot<M> dot;
#pragma GCC unroll 4
    for (int chain = 0; chain < Dot<M>::kChains; ++chain)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) dot.sum[chain][m] = _mm256_setzero_ps();
    dot.input = input;
    const uint8_t* end = block + region.cols / kBlock * (kLanes * bits);
#pragma GCC unroll 1
    for (; block < end; block += kLanes * bits, dot.input += kBlock * M) {
      // Rows follow each other in memory; the hardware's prefetch stops at pages, this one does not.
      _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(block) + kPrefetch), _MM_HINT_T0);
      decoder.block(block, dot);
    }
    const int64_t rest = region.cols % kBlock;
    if (rest) {
      // The weights of padding columns are cleared: their codebook entry may be Inf, which zeros in the input do not hide.
      float last[kBlock];
      Store32 store{last};
      decoder.block(block, store);
      for (int64_t c = rest; c < kBlock; ++c) last[c] = 0;
#pragma GCC unroll 1
      for (int64_t c = 0; c < rest; c += 8, dot.input += 8 * M) dot(0, 0, _mm256_loadu_ps(last + c));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      __m256 total = dot.sum[0][m];
#pragma GCC unroll 4
      for (int chain = 1; chain < Dot<M>::kChains; ++chain) total = _mm256_add_ps(total, dot.sum[chain][m]);
      const float sum = horizontal_sum(total);
      sums[i * M + m] = accumulate ? sums[i * M + m] + sum : sum;
    }
  }
}

template <int M, typename T>
void fused(const T* input, const Packed& packed, const float* codebook, int64_t group_rows, const float* bias, T* output,
           const Parallel& parallel) {
  const int64_t cols = packed.cols, padded = round_up(cols, 8);
  std::unique_ptr<float[]> owned;
  const float* interleaved = nullptr;
  if constexpr (M == 1 && std::is_same_v<T, float>) {
    if (cols % 8 == 0) interleaved = input;
  }
  if (!interleaved) {
    owned = scratch(padded * M);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t c = 0; c < padded; c += 8) {
        float* to = owned.get() + c * M + 8 * m;
        if (c + 8 <= cols) widen(input + m * cols + c, 8, to);
        else
          for (int64_t j = 0; j < 8; ++j) to[j] = c + j < cols ? static_cast<float>(input[m * cols + c + j]) : 0.0f;
      }
    interleaved = owned.get();
  }
  const int64_t depth = std::max(kBlock, kFusedInput / M / kBlock * kBlock);
  const int64_t grain = ceil_div(kGrainWork, kBlockRows * (cols + 1) * (M + 8));
  parallel(ceil_div(packed.rows, kBlockRows), grain, [&](int64_t begin_block, int64_t end_block) {
    float sums[kBlockRows * M];
    for (int64_t b = begin_block; b < end_block; ++b) {
      const int64_t row = b * kBlockRows, rows = std::min(kBlockRows, packed.rows - row);
      if (cols == 0) std::fill(sums, sums + kBlockRows * M, 0.0f);
      for (int64_t col = 0; col < cols; col += depth) {
        const Region region{nullptr, row, rows, col, std::min(depth, cols - col), 0};
        with_small(packed.bits, [&](auto bits) {
          dot_rows<bits(), M>(packed, codebook, group_rows, region, interleaved + col * M, sums, col > 0);
        });
      }
      for (int64_t m = 0; m < M; ++m)
        for (int64_t i = 0; i < rows; ++i)
          narrow(sums[i * M + m] + (bias ? bias[row + i] : 0.0f), output[m * packed.rows + row + i]);
    }
  });
}

template <typename T>
KMQ_AVX2 void write_out_avx2(const float* block, int64_t ld, int64_t rows, int64_t m_count, const float* bias, T* output,
                             int64_t output_ld) {
  for (int64_t m = 0; m < m_count; m += 8) {
    for (int64_t i = 0; i < rows; i += 8) {
      if (m + 8 <= m_count && i + 8 <= rows) {
        __m256 r[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) r[j] = _mm256_loadu_ps(block + (i + j) * ld + m);
        transpose8(r);
        const __m256 add = bias ? _mm256_loadu_ps(bias + i) : _mm256_setzero_ps();
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) store8(output + (m + j) * output_ld + i, _mm256_add_ps(r[j], add));
      } else {
        for (int64_t j = m; j < std::min(m + 8, m_count); ++j)
          for (int64_t k = i; k < std::min(i + 8, rows); ++k)
            narrow(block[k * ld + j] + (bias ? bias[k] : 0.0f), output[j * output_ld + k]);
      }
    }
  }
}

#endif  // KMQ_X86

// output[m, i] = block[i, m] + bias[i]
template <typename T>
void write_out(const float* block, int64_t ld, int64_t rows, int64_t m_count, const float* bias, T* output, int64_t output_ld) {
#ifdef KMQ_X86
  if (avx2()) return write_out_avx2(block, ld, rows, m_count, bias, output, output_ld);
#endif
  for (int64_t m = 0; m < m_count; ++m)
    for (int64_t i = 0; i < rows; ++i) narrow(block[i * ld + m] + (bias ? bias[i] : 0.0f), output[m * output_ld + i]);
}

// The tile's left operand is the decoded weight, as rows, and its right operand the input, so that decoded registers of 8 columns
// are stored as they come; the transposed result is turned when it is written.
template <typename T>
void tiled(const T* input, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows, const float* bias, T* output,
           const Parallel& parallel) {
  const int64_t cols = packed.cols, panels = ceil_div(M, kTileCols), last_m = M - (panels - 1) * kTileCols;
  const bool last_half = last_m <= 8;  // the last panel has width 8
  const int64_t ld = panels * kTileCols;
  // Few panels: the rows of one tile, used while they are in the first-level cache. Many: a panel stays there for all rows.
  const int64_t step = panels <= kFewPanels ? kTileRows : kBlockRows;
  const auto right = scratch(std::max<int64_t>(1, ld * cols));  // panel p, columns from k on: right + (p * cols + k) * 16
  parallel(panels, ceil_div(kGrainWork, 16 * (cols + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const T* from = input + p * kTileCols * cols;
      float* to = right.get() + p * kTileCols * cols;
      if (p == panels - 1 && last_half) pack_rows<8>(from, cols, last_m, cols, to);
      else pack_rows<16>(from, cols, std::min<int64_t>(kTileCols, M - p * kTileCols), cols, to);
    }
  });
  const int64_t grain = ceil_div(kGrainWork, kBlockRows * (cols + 1) * (M + 8));
  parallel(ceil_div(packed.rows, kBlockRows), grain, [&](int64_t begin_block, int64_t end_block) {
    const auto left = scratch(kBlockRows * kStripLd), result = scratch(kBlockRows * ld);
    std::fill(left.get(), left.get() + kBlockRows * kStripLd, 0.0f);
    for (int64_t b = begin_block; b < end_block; ++b) {
      const int64_t row = b * kBlockRows, rows = std::min(kBlockRows, packed.rows - row);
      if (cols == 0) std::fill(result.get(), result.get() + kBlockRows * ld, 0.0f);
      for (int64_t col = 0; col < cols; col += kDepth) {
        const int64_t depth = std::min(kDepth, cols - col);
        for (int64_t first = 0; first < rows; first += step) {
          const int64_t last = std::min(first + step, rows);
          float* decoded = left.get() + first * kStripLd;
          decode_rows(packed, codebook, group_rows, Region{nullptr, row + first, last - first, col, depth, kStripLd}, decoded);
          for (int64_t p = 0; p < panels; ++p)
            for (int64_t i = first; i < last; i += kTileRows) {
              const float* a = left.get() + i * kStripLd;
              float* c = result.get() + i * ld + p * kTileCols;
              const int64_t tile_rows = std::min<int64_t>(kTileRows, rows - i);
              if (p == panels - 1 && last_half)
                gemm_tile<8, kStripLd, 1>(depth, a, right.get() + p * kTileCols * cols + col * 8, c, ld, tile_rows, 8, col > 0);
              else
                gemm_tile<16, kStripLd, 1>(depth, a, right.get() + (p * cols + col) * kTileCols, c, ld, tile_rows, kTileCols, col > 0);
            }
        }
      }
      write_out(result.get(), ld, rows, M, bias ? bias + row : nullptr, output + row, packed.rows);
    }
  });
}

template <typename T>
void linear(const T* input, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows, const float* bias, T* output,
            const Parallel& parallel) {
#ifdef KMQ_X86
  if (avx2() && M <= kFusedRows) {
    const auto run = [&](auto rows) { fused<rows()>(input, packed, codebook, group_rows, bias, output, parallel); };
    return with_small(static_cast<int>(M), run);
  }
#endif
  for (int64_t m = 0; m < M; m += kChunkM)
    tiled(input + m * packed.cols, std::min(kChunkM, M - m), packed, codebook, group_rows, bias, output + m * packed.rows, parallel);
}

// One block of kBlock columns is decoded over kDepth rows into panels of 16 columns, the right operand; grad_output is the left.
template <typename T>
void input_grad(const T* grad_output, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows, T* grad_input,
                const Parallel& parallel) {
  constexpr int64_t kPanels = kBlock / kTileCols, kPanelLd = kDepth * kTileCols + 16;
  const int64_t strips = ceil_div(M, kTileRows), OUT = packed.rows, cols = packed.cols;
  const auto left = scratch(std::max<int64_t>(1, strips * kTileRows * OUT));
  parallel(strips, ceil_div(kGrainWork, 16 * (OUT + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      pack_rows<kTileRows>(grad_output + s * kTileRows * OUT, OUT, std::min<int64_t>(kTileRows, M - s * kTileRows), OUT,
                           left.get() + s * kTileRows * OUT);
  });
  const int64_t grain = ceil_div(kGrainWork, kBlock * (OUT + 1) * (M + 8));
  parallel(ceil_div(cols, kBlock), grain, [&](int64_t begin_block, int64_t end_block) {
    constexpr bool direct = std::is_same_v<T, float>;
    const auto right = scratch(kPanels * kPanelLd), result = scratch(direct ? 1 : M * kBlock);
    for (int64_t b = begin_block; b < end_block; ++b) {
      const int64_t col = b * kBlock, width = std::min(kBlock, cols - col);
      float* c = result.get();
      int64_t ld = kBlock;
      if constexpr (direct) {
        c = grad_input + col;
        ld = cols;
      }
      if (OUT == 0)
        for (int64_t m = 0; m < M; ++m) std::fill(c + m * ld, c + m * ld + width, 0.0f);
      for (int64_t row = 0; row < OUT; row += kDepth) {
        const int64_t depth = std::min(kDepth, OUT - row);
        float weights[kBlock] = {};
        for (int64_t k = 0; k < depth; ++k) {
          decode_rows(packed, codebook, group_rows, Region{nullptr, row + k, 1, col, width, 0}, weights);
          for (int64_t p = 0; p < kPanels; ++p)
            std::memcpy(right.get() + p * kPanelLd + k * kTileCols, weights + p * kTileCols, kTileCols * sizeof(float));
        }
        for (int64_t p = 0; p * kTileCols < width; ++p)
          for (int64_t s = 0; s < strips; ++s)
            gemm_tile(depth, left.get() + (s * OUT + row) * kTileRows, right.get() + p * kPanelLd,
                      c + s * kTileRows * ld + p * kTileCols, ld, std::min<int64_t>(kTileRows, M - s * kTileRows),
                      std::min<int64_t>(kTileCols, width - p * kTileCols), row > 0);
      }
      if constexpr (!direct)
        for (int64_t m = 0; m < M; ++m)
          for (int64_t j = 0; j < width; ++j) narrow(c[m * ld + j], grad_input[m * cols + col + j]);
    }
  });
}

}  // namespace

void codebook_linear(const void* input, Dtype dtype, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows,
                     const float* bias, void* output, const Parallel& parallel) {
  if (M == 0 || packed.rows == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    linear(static_cast<const T*>(input), M, packed, codebook, group_rows, bias, static_cast<T*>(output), parallel);
  });
}

void codebook_linear_input_grad(const void* grad_output, Dtype dtype, int64_t M, const Packed& packed, const float* codebook,
                                int64_t group_rows, void* grad_input, const Parallel& parallel) {
  if (M == 0 || packed.cols == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t OUT = packed.rows;
    for (int64_t m = 0; m < M; m += kChunkM)
      input_grad(static_cast<const T*>(grad_output) + m * OUT, std::min(kChunkM, M - m), packed, codebook, group_rows,
                 static_cast<T*>(grad_input) + m * packed.cols, parallel);
  });
}

}  // namespace kmq::cpu
