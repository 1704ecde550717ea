// The linear layer on packed weights. Which way is taken depends on M, the rows of the input:
//
//   small M   (up to 8 rows, AVX2 up to 16, see most_rows) every packed row is decoded in registers and multiplied with up to kFusedRows
//             input rows at once
//   few rows  (AVX-512, up to kFewRows) 16 packed rows are turned, so that a decoded register belongs to one column, and multiplied
//             with up to 16 input rows at once
//   else      panels of the weight are decoded into the cache and multiplied by the tiles of gemm.h
//
// The order of additions depends on M, the columns and the bits of the weight alone, so the result is the same for any number of threads.
#include <vector>

#include "../codes/decode.h"
#include "gemm.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kDotRows = 48;  // rows of the weight that are one task of the fused way
constexpr int64_t kColumns = 64;  // columns of the output that are one task of codebook_linear
constexpr int64_t kFewRows = 32;  // of the input: they stay in the first-level cache, and panels are decoded one by one beside them,
constexpr int64_t kFewDepth = 128;  // so deep
constexpr int64_t kFewColumns = 4096;  // of fp32 sums of few rows of a narrower output
constexpr int64_t kStripRows = 1020;   // of fp32 sums otherwise: a multiple of the rows of every tile
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
template <typename T>
KMQ_AVX2 void narrow_avx2(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store8(to + i, _mm256_loadu_ps(from + i));
  for (; i < count; ++i) narrow(from[i], to[i]);
}
#endif

template <typename T>
void narrow_row(const float* from, int64_t count, T* to) {
#ifdef KMQ_X86
  if (avx2()) return narrow_avx2(from, count, to);
#endif
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

#ifdef KMQ_X86

constexpr int kFusedRows = 8;
constexpr int64_t kPrefetch = 1024;  // bytes of packed rows
constexpr int64_t kFusedInput = 6144;  // floats of input that stay in the first-level cache beside the packed row

// Adds weights * input to M sums; the input is interleaved by groups of 8 columns: [cols / 8][M][8].
template <int M, int kChains>
struct Dot {
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
  // Up to 5 bits, decoding twice costs less than panels do. Of 6 bits, the tables leave no registers for more sums.
  static constexpr int most_rows(int bits) { return bits <= 5 ? 2 * kFusedRows : bits == 6 ? 5 : kFusedRows; }

  // sums[i * M + m] (+)= dot of row i of the region and row m of the input.
  template <int bits, int M>
  KMQ_AVX2 static void rows(const Packed& packed, const float* codebook, int64_t group_rows, const Region& region, const float* input,
                            float* sums, bool accumulate) {
    // Decoding 6 bits takes long enough for one chain of additions, and leaves no registers.
    constexpr int kChains = M == 1 ? 4 : M <= 4 && (bits != 6 || M == 2) ? 2 : 1;
    const int64_t row_bytes = packed.row_bytes();
    const float* book = nullptr;
    Decoder<bits> decoder{};
    for (int64_t i = 0; i < region.rows; ++i) {
      const int64_t row = region.begin + i;
      const float* row_book = codebook + ((row / group_rows) << bits);
      if (row_book != book) decoder.load(book = row_book);
      const uint8_t* block = packed.data + row * row_bytes + region.first_col / kBlock * (kLanes * bits);
      Dot<M, kChains> dot;
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain)
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
        for (int chain = 1; chain < kChains; ++chain) total = _mm256_add_ps(total, dot.sum[chain][m]);
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

// Of the columns below `rest`. The weights of padding columns are cleared, see DotAvx2.
template <int M>
struct DotRest512 {
  Dot512<M>& dot;
  int64_t rest;
  KMQ_AVX512_INLINE void operator()(int column, int chain, __m512 weights) {
    if (column < rest) dot(column, chain, _mm512_maskz_mov_ps(first_lanes(rest - column), weights));
  }
};

struct DotAvx512 {
  static constexpr int64_t kLane = 16;
  static constexpr int most_rows(int) { return kFusedRows; }

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
        DotRest512<M> last{dot, rest};
        decoder.block(block, last);
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

template <typename Path, typename T>
void fused(const T* input, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows, const float* bias, T* output,
           const Parallel& parallel) {
  constexpr int64_t lane = Path::kLane;
  const int64_t cols = packed.cols, padded = round_up(cols, lane);
  const int64_t part = ceil_div(M, ceil_div(M, kFusedRows));  // rows of the input that are multiplied at once
  Scratch owned;
  const float* interleaved = nullptr;  // part after part
  if constexpr (std::is_same_v<T, float>) {
    if (M == 1 && cols % lane == 0) interleaved = input;
  }
  if (!interleaved) {
    owned = scratch(padded * M);
    for (int64_t m = 0; m < M; ++m) {
      const int64_t first = m / part * part, rows = std::min(part, M - first);
      for (int64_t c = 0; c < padded; c += lane) {
        float* to = owned.get() + first * padded + c * rows + lane * (m - first);
        const int64_t count = std::min(lane, cols - c);
        widen(input + m * cols + c, count, to);
        std::fill(to + count, to + lane, 0.0f);
      }
    }
    interleaved = owned.get();
  }
  const int64_t depth = std::max(kBlock, kFusedInput / part / kBlock * kBlock);
  const int64_t grain = ceil_div(kGrainWork, kDotRows * (cols + 1) * (M + 8));
  parallel(ceil_div(packed.rows, kDotRows), grain, [&](int64_t begin_block, int64_t end_block) {
    float sums[kDotRows * kFusedRows];
    for (int64_t b = begin_block; b < end_block; ++b)
      for (int64_t first = 0; first < M; first += part) {
        const int64_t row = b * kDotRows, rows = std::min(kDotRows, packed.rows - row), here = std::min(part, M - first);
        if (cols == 0) std::fill(sums, sums + kDotRows * here, 0.0f);
        with_small(static_cast<int>(here), [&](auto lines) {
          with_small(packed.bits, [&](auto bits) {
            if constexpr (lines() <= Path::most_rows(bits()))
              for (int64_t col = 0; col < cols; col += depth) {
                const Region region{nullptr, row, rows, col, std::min(depth, cols - col), 0};
                const float* const left = interleaved + first * padded + col * lines();
                Path::template rows<bits(), lines()>(packed, codebook, group_rows, region, left, sums, col > 0);
              }
          });
        });
        for (int64_t m = 0; m < here; ++m)
          for (int64_t i = 0; i < rows; ++i)
            narrow(sums[i * here + m] + (bias ? bias[row + i] : 0.0f), output[(first + m) * packed.rows + row + i]);
      }
  });
}

// Adds columns c, c + 16, .. of 16 rows of the weight times R rows of input to R sums: all 8, or those that exist.
template <int R, bool whole>
struct Outer512 {
  const float* left;  // [depth][16] from column c on
  int64_t depth;
  __m512 (&sum)[R];
  KMQ_AVX512_INLINE void operator()(int column, int, __m512 weights) {
    if (!whole && column >= depth) return;
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sum[i] = _mm512_fmadd_ps(weights, _mm512_set1_ps(left[column * 16 + i]), sum[i]);
  }
};

// c [rows, lanes] (ldc floats apart) = left @ weights + bias for up to R rows of input, `left` [depth][16], and 16 rows of the weight,
// `turned` block by block. `ahead` is what is turned next, of the same size.
template <int bits, int R>
KMQ_AVX512 void turned_tile(const Decoder512<bits>& decoder, const uint8_t* turned, const uint8_t* ahead, int64_t depth, const float* left,
                            const float* bias, int64_t rows, int64_t lanes, float* c, int64_t ldc) {
  constexpr int64_t size = kLanes * bits;
  alignas(64) float total[R * 16] = {};  // of whole blocks: sums of short chains keep the rounding error of a long row small
  __m512 sum[R];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) sum[i] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + kBlock <= depth; k += kBlock, left += (kBlock - kLanes) * 16) {
#pragma GCC unroll 1
    for (int lane = 0; lane < kLanes; ++lane, turned += size, ahead += size, left += 16) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
      Outer512<R, true> outer{left, 0, sum};
      decoder.block(turned, outer);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      _mm512_store_ps(total + 16 * i, _mm512_add_ps(_mm512_load_ps(total + 16 * i), sum[i]));
      sum[i] = _mm512_setzero_ps();
    }
  }
  for (int lane = 0; lane < kLanes && k + lane < depth; ++lane, turned += size, left += 16) {
    Outer512<R, false> outer{left, depth - k - lane, sum};
    decoder.block(turned, outer);
  }
  const __mmask16 mask = first_lanes(lanes);
  const __m512 add = bias ? _mm512_maskz_loadu_ps(mask, bias) : _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
    if (i < rows) _mm512_mask_storeu_ps(c + i * ldc, mask, _mm512_add_ps(_mm512_add_ps(_mm512_load_ps(total + 16 * i), sum[i]), add));
}

// c [M, lanes] for the 16 rows of the weight from `row` on, fewer at its end.
template <int bits>
KMQ_AVX512 void turned_rows(const Packed& packed, const float* book, int64_t row, int64_t lanes, const float* left, int64_t M,
                            const float* bias, uint8_t* turned, float* c, int64_t ldc) {
  constexpr int64_t size = kLanes * bits;
  const int64_t bytes = packed.row_bytes();
  Decoder512<bits> decoder;
  decoder.load(book);
  for (int64_t at = 0; at < bytes; at += size) turn_blocks<bits>(packed, row, row + lanes - 1, at, turned + at * 16);
  const uint8_t* ahead = packed.data + std::min(row + 16, packed.rows - lanes) * bytes;
  for (int64_t m = 0; m < M; m += 16, left += packed.cols * 16, c += 16 * ldc) {
    const int64_t rows = std::min<int64_t>(16, M - m);
    if (rows > 12) turned_tile<bits, 16>(decoder, turned, ahead, packed.cols, left, bias, rows, lanes, c, ldc);
    else if (rows > 8) turned_tile<bits, 12>(decoder, turned, ahead, packed.cols, left, bias, rows, lanes, c, ldc);
    else turned_tile<bits, 8>(decoder, turned, ahead, packed.cols, left, bias, rows, lanes, c, ldc);
  }
}

template <typename T>
void linear_turned(const T* input, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows, const float* bias,
                   T* output, const Parallel& parallel) {
  const int64_t cols = packed.cols, strips = ceil_div(M, 16), turned_floats = 16 * packed.row_bytes() / sizeof(float);
  parallel(ceil_div(packed.rows, 16), ceil_div(kGrainWork, 16 * (cols + 1) * (M + 8)), [&](int64_t begin, int64_t end) {
    float* const left = workspace(strips * 16 * (cols + 16) + turned_floats);
    uint8_t* const turned = reinterpret_cast<uint8_t*>(left + strips * 16 * cols);
    float* const narrow = left + strips * 16 * cols + turned_floats;
    for (int64_t m = 0; m < M; m += 16) GemmAvx512::pack_rows<16>(input + m * cols, cols, std::min<int64_t>(16, M - m), cols, left + m * cols);
    for (int64_t row = 16 * begin; row < std::min(16 * end, packed.rows); row += 16) {
      const int64_t lanes = std::min<int64_t>(16, packed.rows - row);
      constexpr bool direct = std::is_same_v<T, float>;
      float* c = narrow;
      if constexpr (direct) c = output + row;
      const float* book = codebook + ((row / group_rows) << packed.bits);
      with_small(packed.bits, [&](auto bits) {
        turned_rows<bits()>(packed, book, row, lanes, left, M, bias ? bias + row : nullptr, turned, c, direct ? packed.rows : 16);
      });
      if constexpr (!direct)
        for (int64_t m = 0; m < M; ++m) narrow_row(narrow + 16 * m, lanes, output + m * packed.rows + row);
    }
  });
}

#endif  // KMQ_X86

// Asks for the packed rows that are decoded next: they are far apart, which the hardware does not foresee.
inline void prefetch_rows(const Packed& packed, int64_t row, int64_t rows, int64_t first_col, int64_t cols) {
  const int64_t begin = first_col / kBlock * kLanes * packed.bits, bytes = ceil_div(cols, kBlock) * kLanes * packed.bits;
  for (int64_t i = row; i < std::min(row + rows, packed.rows); ++i)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(packed.data + i * packed.row_bytes() + begin + at);
}

// Rows of a left operand lie so far apart that those of one tile fall in different cache sets; panels likewise.
template <typename Gemm>
constexpr int64_t kStripLd = Gemm::kDepth + 16;
template <typename Gemm>
constexpr int64_t kPanelLd = Gemm::kDepth * Gemm::kCols + 16;

// out [M, N] = left [M, K] @ right [K, N] + bias, where decode(k, depth, column, columns, panels) writes depth steps of the panels
// of some columns of the right operand, kPanelLd floats apart. Tasks are `unit` columns; `least` columns can be decoded at once.
//
// fp32 is summed where it belongs; a narrower output in a strip of fp32, kStripRows rows of the columns that are decoded at once (of
// few rows: kFewColumns), so that the panels are decoded once for so many rows and the strip stays in the second-level cache.
template <typename Gemm, typename T, typename Decode>
void multiply(const T* left, int64_t M, int64_t K, int64_t N, int64_t unit, int64_t least, const float* bias, T* out, const Decode& decode,
              const Parallel& parallel) {
  constexpr int64_t W = Gemm::kCols, strip_ld = kStripLd<Gemm>, panel_ld = kPanelLd<Gemm>;
  constexpr bool direct = std::is_same_v<T, float>;
  static_assert(Gemm::kWide % kBlock == 0 && kBlock % W == 0 && Gemm::kDepth % kBlock == 0 && kFewColumns % kBlock == 0);
  const bool few = M <= kFewRows;
  const int64_t wide = few ? least : Gemm::kWide, cut = few ? kFewDepth : Gemm::kDepth, strip = round_up(few ? M : 1, 12);
  const int64_t rows_at_once = direct ? M : std::min(M, kStripRows), columns_at_once = direct ? N : few ? kFewColumns : wide;
  const int64_t grain = ceil_div(kGrainWork, unit * (K + 1) * (M + 8));
  parallel(ceil_div(N, unit), grain, [&](int64_t begin_unit, int64_t end_unit) {
    const int64_t begin = begin_unit * unit, end = std::min(N, end_unit * unit), columns = std::min(columns_at_once, end - begin);
    const int64_t panels_size = wide / W * panel_ld, strip_size = strip * strip_ld, sums_ld = round_up(columns, 16) + 16;
    float* const panels = workspace(panels_size + strip_size + (direct ? 0 : rows_at_once * sums_ld));
    float *const rows = panels + panels_size, *const sums = rows + strip_size;
    std::fill(rows, rows + strip_size, 0.0f);  // a tile reads rows that its tail lacks
    // Rows [m_begin, m_end) and columns [n_begin, n_end) of the output.
    const auto block = [&](int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
      float* c = sums;
      int64_t ld = sums_ld;
      if constexpr (direct) {
        c = out + m_begin * N + n_begin;
        ld = N;
      }
      for (int64_t k = 0; k == 0 || k < K; k += cut) {
        const int64_t depth = std::min(cut, K - k);
        if (few)
          for (int64_t m = 0; m < M; ++m) widen(left + m * K + k, depth, rows + m * strip_ld);
        for (int64_t first = n_begin; first < n_end; first += wide) {
          const int64_t last = std::min(n_end, first + wide);
          decode(k, depth, first, last - first, panels);
          for (int64_t m = m_begin, here; m < m_end; m += here) {
            here = Gemm::rows_of_next(m_end - m);
            if (!few)
              for (int64_t i = 0; i < here; ++i) widen(left + (m + i) * K + k, depth, rows + i * strip_ld);
            for (int64_t j = first; j < last; j += W)
              Gemm::template tile<strip_ld, 1>(here, depth, rows + (few ? m * strip_ld : 0), panels + (j - first) / W * panel_ld,
                                               c + (m - m_begin) * ld + j - n_begin, ld, last - j, bias ? bias + j : nullptr, k > 0);
          }
        }
      }
      if constexpr (!direct)
        for (int64_t m = m_begin; m < m_end; ++m) narrow_row(c + (m - m_begin) * ld, n_end - n_begin, out + m * N + n_begin);
    };
    for (int64_t m = 0; m < M; m += rows_at_once)
      for (int64_t n = begin; n < end; n += columns_at_once) block(m, std::min(M, m + rows_at_once), n, std::min(end, n + columns_at_once));
  });
}

template <typename T>
void linear(const T* input, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows, const float* bias, T* output,
            const Parallel& parallel) {
#ifdef KMQ_X86
  if (avx512() && M <= DotAvx512::most_rows(packed.bits))
    return fused<DotAvx512>(input, M, packed, codebook, group_rows, bias, output, parallel);
  if (avx2() && !avx512() && M <= DotAvx2::most_rows(packed.bits))
    return fused<DotAvx2>(input, M, packed, codebook, group_rows, bias, output, parallel);
  if (avx512() && M <= kFewRows && (group_rows % 16 == 0 || group_rows >= packed.rows))
    return linear_turned(input, M, packed, codebook, group_rows, bias, output, parallel);
#endif
  with_gemm([&](auto path) {
    using Gemm = decltype(path);
    constexpr int64_t W = Gemm::kCols;
    const auto decode = [&](int64_t k, int64_t depth, int64_t row, int64_t rows, float* panels) {
      for (int64_t i = 0; i < rows; i += W, panels += kPanelLd<Gemm>) {
        const int64_t lanes = std::min(W, rows - i);
        prefetch_rows(packed, row + i + W, W, k, depth);
        if (decode_panel<W>(packed, codebook, group_rows, row + i, lanes, k, depth, panels)) continue;
        float strip[W * kStripLd<Gemm>];
        decode_rows(packed, codebook, group_rows, Region{nullptr, row + i, lanes, k, depth, kStripLd<Gemm>}, strip);
        Gemm::template pack_rows<W>(strip, kStripLd<Gemm>, lanes, depth, panels);
      }
    };
    multiply<Gemm>(input, M, packed.cols, packed.rows, kColumns, W, bias, output, decode, parallel);
  });
}

template <typename T>
void input_grad(const T* grad_output, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows, T* grad_input,
                const Parallel& parallel) {
  with_gemm([&](auto path) {
    using Gemm = decltype(path);
    constexpr int64_t W = Gemm::kCols;
    const auto decode = [&](int64_t k, int64_t depth, int64_t col, int64_t cols, float* panels) {
      float weights[Gemm::kWide] = {};
      for (int64_t i = 0; i < depth; ++i) {
        decode_rows(packed, codebook, group_rows, Region{nullptr, k + i, 1, col, cols, 0}, weights);
        for (int64_t j = 0; j < cols; j += W) std::memcpy(panels + j / W * kPanelLd<Gemm> + i * W, weights + j, W * sizeof(float));
      }
    };
    multiply<Gemm>(grad_output, M, packed.rows, packed.cols, kBlock, kBlock, nullptr, grad_input, decode, parallel);
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
    input_grad(static_cast<const T*>(grad_output), M, packed, codebook, group_rows, static_cast<T*>(grad_input), parallel);
  });
}

}  // namespace kmq::cpu
