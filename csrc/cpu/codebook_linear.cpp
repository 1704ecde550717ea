// The linear layer on packed weights. Which way is taken depends on M, the rows of the input:
//
//   small M   every packed row is decoded in registers and multiplied with up to kFusedRows input rows at once
//   else      kBlockRows packed rows x kDepth columns are decoded into the second-level cache and multiplied by gemm_tile
//
// Both cut OUT into blocks of kBlockRows rows, and the order of additions within a block depends on M and IN alone, so the
// result is the same for any number of threads.
#include <vector>

#include "decode.h"
#include "gemm.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kBlockRows = 48;
constexpr int64_t kChunkM = 512;      // rows of the input that share one decoded block
constexpr int64_t kStripLd = kDepth + 16;  // of the rows of a left operand: rows of one tile in different cache sets
constexpr int64_t kFewPanels = 4;
constexpr int64_t kGrainWork = 1 << 19;  // multiplications (a decoded weight counts as 8) that are worth a thread

template <typename F>
void with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::f32) f(float{});
  else if (dtype == Dtype::bf16) f(bf16{});
  else f(f16{});
}

#ifdef KMQ_X86
template <typename T>
KMQ_AVX2 void widen_avx2(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, load8(from + i));
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}
#endif

template <typename T>
void widen(const T* from, int64_t count, float* to) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(to, from, count * sizeof(float));
  } else {
#ifdef KMQ_X86
    if (avx2()) return widen_avx2(from, count, to);
#endif
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
  }
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

// A way to multiply packed rows with few rows of an input that is interleaved by groups of kLane columns: [cols / kLane][M][kLane],
// zeros in the columns that the last group lacks.
struct DotAvx2 {
  static constexpr int64_t kLane = 8;

  // sums[i * M + m] (+)= dot of row i of the region and row m of the input.
  template <int bits, int M>
  KMQ_AVX2 static void rows(const Packed& packed, const float* codebook, int64_t group_rows, const Region& region, const float* input,
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
};

template <int M>
struct Dot512 {
  static constexpr int kChains = M == 1 ? 4 : M <= 4 ? 2 : 1;
  const float* input;
  __m512 sum[kChains][M];
  KMQ_AVX512_INLINE void operator()(int column, int chain, __m512 weights) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      __m512& to = sum[chain % kChains][m];
      to = _mm512_fmadd_ps(weights, _mm512_loadu_ps(input + column * M + 16 * m), to);
    }
  }
};

struct DotAvx512 {
  static constexpr int64_t kLane = 16;

  template <int bits, int M>
  KMQ_AVX512 static void rows(const Packed& packed, const float* codebook, int64_t group_rows, const Region& region,
                              const float* input, float* sums, bool accumulate) {
    const int64_t row_bytes = packed.row_bytes();
    const float* book = nullptr;
    Decoder512<bits> decoder;
    for (int64_t i = 0; i < region.rows; ++i) {
      const int64_t row = region.begin + i;
      const float* row_book = codebook + ((row / group_rows) << bits);
      if (row_book != book) decoder.load(book = row_book);
      const uint8_t* block = packed.data + row * row_bytes + region.first_col / kBlock * (kLanes * bits);
      Dot512<M> dot;
#pragma GCC unroll 4
      for (int chain = 0; chain < Dot512<M>::kChains; ++chain)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) dot.sum[chain][m] = _mm512_setzero_ps();
      dot.input = input;
      const uint8_t* end = block + region.cols / kBlock * (kLanes * bits);
#pragma GCC unroll 1
      for (; block < end; block += kLanes * bits, dot.input += kBlock * M) {
        _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(block) + kPrefetch), _MM_HINT_T0);
        decoder.block(block, dot);
      }
      const int64_t rest = region.cols % kBlock;
      if (rest) {
        const Planes512<bits> planes(block);
#pragma GCC unroll 8
        for (int field = 0; field < 8; ++field)
          // The weights of padding columns are cleared, see DotAvx2.
          if (16 * field < rest)
            dot(16 * field, field, _mm512_maskz_mov_ps(first_lanes(rest - 16 * field), decoder.look_up(planes.index(field))));
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        __m512 total = dot.sum[0][m];
#pragma GCC unroll 4
        for (int chain = 1; chain < Dot512<M>::kChains; ++chain) total = _mm512_add_ps(total, dot.sum[chain][m]);
        const float sum = _mm512_reduce_add_ps(total);
        sums[i * M + m] = accumulate ? sums[i * M + m] + sum : sum;
      }
    }
  }
};

template <typename Path, int M, typename T>
void fused(const T* input, const Packed& packed, const float* codebook, int64_t group_rows, const float* bias, T* output,
           const Parallel& parallel) {
  constexpr int64_t lane = Path::kLane;
  const int64_t cols = packed.cols, padded = round_up(cols, lane);
  Scratch owned;
  const float* interleaved = nullptr;
  if constexpr (M == 1 && std::is_same_v<T, float>) {
    if (cols % lane == 0) interleaved = input;
  }
  if (!interleaved) {
    owned = scratch(padded * M);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t c = 0; c < padded; c += lane) {
        float* to = owned.get() + c * M + lane * m;
        const int64_t count = std::min(lane, cols - c);
        widen(input + m * cols + c, count, to);
        std::fill(to + count, to + lane, 0.0f);
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
          Path::template rows<bits(), M>(packed, codebook, group_rows, region, interleaved + col * M, sums, col > 0);
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

template <typename T>
KMQ_AVX512 void write_out_avx512(const float* block, int64_t ld, int64_t rows, int64_t m_count, const float* bias, T* output,
                                 int64_t output_ld) {
  for (int64_t i = 0; i < rows; i += 16) {
    const __mmask16 here = first_lanes(rows - i);
    const __m512 add = bias ? _mm512_maskz_loadu_ps(here, bias + i) : _mm512_setzero_ps();
    for (int64_t m = 0; m < m_count; m += 16) {
      const __mmask16 mask = first_lanes(m_count - m);
      __m512 r[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) r[j] = _mm512_maskz_loadu_ps(i + j < rows ? mask : __mmask16(0), block + (i + j) * ld + m);
      transpose16(r);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j)
        if (m + j < m_count) store16(output + (m + j) * output_ld + i, _mm512_add_ps(r[j], add), here);
    }
  }
}

#endif  // KMQ_X86

// output[m, i] = block[i, m] + bias[i]
template <typename T>
void write_out(const float* block, int64_t ld, int64_t rows, int64_t m_count, const float* bias, T* output, int64_t output_ld) {
#ifdef KMQ_X86
  if (avx512()) return write_out_avx512(block, ld, rows, m_count, bias, output, output_ld);
  if (avx2()) return write_out_avx2(block, ld, rows, m_count, bias, output, output_ld);
#endif
  for (int64_t m = 0; m < m_count; ++m)
    for (int64_t i = 0; i < rows; ++i) narrow(block[i * ld + m] + (bias ? bias[i] : 0.0f), output[m * output_ld + i]);
}

// The tile's left operand is the decoded weight, as rows, and its right operand the input, so that decoded registers are stored
// as they come; the transposed result is turned when it is written.
template <typename Gemm, typename T>
void tiled(const T* input, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows, const float* bias, T* output,
           const Parallel& parallel) {
  constexpr int64_t R = Gemm::kRows, W = Gemm::kCols;
  static_assert(kBlockRows % (2 * R) == 0);
  const int64_t cols = packed.cols, panels = ceil_div(M, W), last_m = M - (panels - 1) * W;
  const bool last_half = last_m <= W / 2;  // the last panel has half the width
  const int64_t ld = panels * W;
  // Few panels: the rows of one tile, used while they are in the first-level cache. Many: a panel stays there for all rows.
  const int64_t step = panels <= kFewPanels ? 2 * R : kBlockRows;
  const auto right = scratch(std::max<int64_t>(1, ld * cols));  // panel p, columns from k on: right + (p * cols + k) * W
  parallel(panels, ceil_div(kGrainWork, 16 * (cols + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const T* from = input + p * W * cols;
      float* to = right.get() + p * W * cols;
      if (p == panels - 1 && last_half) Gemm::template pack_rows<W / 2>(from, cols, last_m, cols, to);
      else Gemm::template pack_rows<W>(from, cols, std::min(W, M - p * W), cols, to);
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
          for (int64_t p = 0; p < panels; ++p) {
            const bool half = p == panels - 1 && last_half;
            const float* panel = right.get() + p * W * cols + col * (half ? W / 2 : W);
            for (int64_t i = first; i < last; i += half ? 2 * R : R) {
              const float* a = left.get() + i * kStripLd;
              float* c = result.get() + i * ld + p * W;
              if (half) Gemm::template tile<2 * R, W / 2, kStripLd, 1>(depth, a, panel, c, ld, rows - i, W / 2, col > 0);
              else Gemm::template tile<R, W, kStripLd, 1>(depth, a, panel, c, ld, rows - i, W, col > 0);
            }
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
  if (avx2() && M <= kFusedRows)
    return with_small(static_cast<int>(M), [&](auto rows) {
      if (avx512()) fused<DotAvx512, rows()>(input, packed, codebook, group_rows, bias, output, parallel);
      else fused<DotAvx2, rows()>(input, packed, codebook, group_rows, bias, output, parallel);
    });
#endif
  with_gemm([&](auto gemm) {
    for (int64_t m = 0; m < M; m += kChunkM)
      tiled<decltype(gemm)>(input + m * packed.cols, std::min(kChunkM, M - m), packed, codebook, group_rows, bias,
                            output + m * packed.rows, parallel);
  });
}

// One block of kBlock columns is decoded over kDepth rows into panels, the right operand; grad_output is the left, as rows.
template <typename Gemm, typename T>
void input_grad(const T* grad_output, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows, T* grad_input,
                const Parallel& parallel) {
  constexpr int64_t R = Gemm::kRows, W = Gemm::kCols, kPanels = kBlock / W, kPanelLd = kDepth * W + 16;
  const int64_t strips = ceil_div(M, R), OUT = packed.rows, cols = packed.cols, chunks = ceil_div(OUT, kDepth);
  const auto left = scratch(strips * chunks * R * kStripLd);  // [chunk][strip][R][kStripLd]
  parallel(strips, ceil_div(kGrainWork, 16 * (OUT + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < R; ++i) {
          float* to = left.get() + ((chunk * strips + s) * R + i) * kStripLd;
          const int64_t m = s * R + i, depth = std::min(kDepth, OUT - chunk * kDepth);
          if (m < M) widen(grad_output + m * OUT + chunk * kDepth, depth, to);
          else std::fill(to, to + depth, 0.0f);
        }
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
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t row = chunk * kDepth, depth = std::min(kDepth, OUT - row);
        float weights[kBlock] = {};
        for (int64_t k = 0; k < depth; ++k) {
          decode_rows(packed, codebook, group_rows, Region{nullptr, row + k, 1, col, width, 0}, weights);
          for (int64_t p = 0; p < kPanels; ++p)
            std::memcpy(right.get() + p * kPanelLd + k * W, weights + p * W, W * sizeof(float));
        }
        for (int64_t p = 0; p * W < width; ++p)
          for (int64_t s = 0; s < strips; ++s)
            Gemm::template tile<R, W, kStripLd, 1>(depth, left.get() + (chunk * strips + s) * R * kStripLd, right.get() + p * kPanelLd,
                                                   c + s * R * ld + p * W, ld, M - s * R, width - p * W, row > 0);
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
      with_gemm([&](auto gemm) {
        input_grad<decltype(gemm)>(static_cast<const T*>(grad_output) + m * OUT, std::min(kChunkM, M - m), packed, codebook,
                                   group_rows, static_cast<T*>(grad_input) + m * packed.cols, parallel);
      });
  });
}

}  // namespace kmq::cpu
