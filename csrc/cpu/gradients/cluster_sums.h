// Sums of values by their packed index: the inner loop of every codebook gradient.
//
// Vector paths, fp32 partial sums by the number of bits:
//
//   1, 2   (AVX-512: 1, 2, 3) one register per centroid; a value is added under the mask "index == k"
//   3, 4   a table over PAIRS of indices: entry (i, j) holds the sums of the first and of the second values whose
//          indices were i and j. Two values cost one load, add and store of 8 bytes. A byte of the 4-bit plane is such a pair,
//          of columns 16 apart: it is the entry's number as it stands.
//   4      (AVX-512) half of the values by that table, half by masks: the one is bound by loads and stores, the other by additions
//   5 .. 8 a table over single indices
//
// Neighbouring values go to different copies of a table, so that an addition seldom waits for the store of the one before.
// After `flush` values the fp32 sums are added to the fp64 sums. An fp32 sum then is a chain of at most kChain additions, so its
// rounding error is at most kChain * 2^-24 of the sum of magnitudes, whatever the size of a tensor.
// fp64 values, and all values on the scalar path, are added to the fp64 sums directly.
//
// The order of additions depends on the sequence of add() calls alone, so each task owns one ClusterSums.
#pragma once
#include <algorithm>

#include "../codes/decode.h"
#include "../simd.h"

namespace kmq::cpu {

constexpr int64_t kChain = 1024;

#ifdef KMQ_X86

// Adds field j of the planes at `block`, 16 columns each, to field[j], shifted by `shift`: the layout of packing.py.
template <int bits, int shift>
KMQ_AVX2_INLINE void add_fields(const uint8_t* block, __m128i field[8]) {
  constexpr int width = bits >= 4 ? 4 : bits >= 2 ? 2 : 1, per_byte = 8 / width;
  const __m128i* source = reinterpret_cast<const __m128i*>(block);
  __m128i bytes[width];  // bytes[b]: byte b of the 16 lanes
  if constexpr (width == 1) {
    bytes[0] = _mm_loadu_si128(source);
  } else if constexpr (width == 2) {
    const __m128i split = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i low = _mm_shuffle_epi8(_mm_loadu_si128(source), split);
    const __m128i high = _mm_shuffle_epi8(_mm_loadu_si128(source + 1), split);
    bytes[0] = _mm_unpacklo_epi64(low, high);
    bytes[1] = _mm_unpackhi_epi64(low, high);
  } else {
    const __m128i split = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i quad[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) quad[i] = _mm_shuffle_epi8(_mm_loadu_si128(source + i), split);
    const __m128i a = _mm_unpacklo_epi32(quad[0], quad[1]), b = _mm_unpackhi_epi32(quad[0], quad[1]);
    const __m128i c = _mm_unpacklo_epi32(quad[2], quad[3]), d = _mm_unpackhi_epi32(quad[2], quad[3]);
    bytes[0] = _mm_unpacklo_epi64(a, c);
    bytes[1] = _mm_unpackhi_epi64(a, c);
    bytes[2] = _mm_unpacklo_epi64(b, d);
    bytes[3] = _mm_unpackhi_epi64(b, d);
  }
  const __m128i mask = _mm_set1_epi8((1 << width) - 1);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const __m128i value = _mm_and_si128(_mm_srli_epi16(bytes[j / per_byte], j % per_byte * width), mask);
    field[j] = shift == 0 ? value : _mm_or_si128(field[j], _mm_slli_epi16(value, shift));
  }
  if constexpr (bits > width) add_fields<bits - width, shift + width>(block + kLanes * width, field);
}

// Reads ahead of the streams of values and packed blocks, over the end of a page, where the processor's own prefetcher stops.
template <typename T>
KMQ_AVX2_INLINE void prefetch_block(const T* values, const uint8_t* blocks) {
  constexpr size_t ahead = 16384, line = 64;
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(blocks) + ahead / 8), _MM_HINT_T0);
#pragma GCC unroll 8
  for (size_t i = 0; i < kBlock * sizeof(T); i += line)
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(values) + ahead + i), _MM_HINT_T0);
}

// The fp32 sums of `bits` bits while they are not yet in the fp64 sums; a kernel for whole blocks, and flush().

// One register a centroid, [2][K] of 8 floats: of the low and of the high 8 columns of a field.
template <int bits>
struct Masked8 {
  static constexpr int K = 1 << bits, floats = 16 * K;
  static constexpr int64_t flush_after = 16 * kChain;

  template <typename T>
  KMQ_AVX2 static void add(const T* values, const uint8_t* blocks, int64_t count, float* table) {
    __m256 sums[2][K];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * K; ++i) sums[i / K][i % K] = _mm256_load_ps(table + 8 * i);
    for (; count > 0; --count, values += kBlock, blocks += kLanes * bits) {
      prefetch_block(values, blocks);
      __m128i field[8];
      add_fields<bits, 0>(blocks, field);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m128i bytes = half ? _mm_unpackhi_epi64(field[j], field[j]) : field[j];
          const __m256i index = _mm256_cvtepu8_epi32(bytes);
          const __m256 x = load8(values + 16 * j + 8 * half);
#pragma GCC unroll 4
          for (int k = 0; k < K; ++k) {
            const __m256 member = _mm256_castsi256_ps(_mm256_cmpeq_epi32(index, _mm256_set1_epi32(k)));
            sums[half][k] = _mm256_add_ps(sums[half][k], _mm256_and_ps(member, x));
          }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2 * K; ++i) _mm256_store_ps(table + 8 * i, sums[i / K][i % K]);
  }

  static void flush(float* table, double* total) {
    for (int i = 0; i < 2 * K; ++i)
      for (int lane = 0; lane < 8; ++lane) total[i % K] += table[8 * i + lane];
    std::memset(table, 0, floats * sizeof(float));
  }
};

// The sum of 16 floats, which are cleared.
KMQ_AVX512_INLINE double take_lanes(float* lanes) {
  const __m512 x = _mm512_load_ps(lanes);
  _mm512_store_ps(lanes, _mm512_setzero_ps());
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

// One register a centroid, [chains][K] of 16 floats; neighbouring fields go to different chains, to cover the latency of an addition.
template <int bits>
struct Masked16 {
  static constexpr int K = 1 << bits, chains = bits == 1 ? 4 : bits == 2 ? 2 : 1, floats = 16 * chains * K;
  static constexpr int64_t flush_after = 16 * kChain;

  template <typename T>
  KMQ_AVX512 static void add(const T* values, const uint8_t* blocks, int64_t count, float* table) {
    __m512 sums[chains][K];
#pragma GCC unroll 8
    for (int i = 0; i < chains * K; ++i) sums[i / K][i % K] = _mm512_load_ps(table + 16 * i);
    for (; count > 0; --count, values += kBlock, blocks += kLanes * bits) {
      prefetch_block(values, blocks);
      __m512i two = _mm512_setzero_si512(), one = two;  // the planes, a lane each
      if constexpr (bits >= 2) two = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(blocks)));
      if constexpr (bits != 2)
        one = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks + kLanes * (bits - 1))));
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        __m512* sum = sums[j % chains];
        const __m512 x = load16(values + 16 * j, 0xffff);
        __m512 high[2] = {x, x};
        if constexpr (bits == 3) {
          high[0] = _mm512_maskz_mov_ps(_mm512_testn_epi32_mask(one, _mm512_set1_epi32(1 << j)), x);
          high[1] = _mm512_maskz_mov_ps(_mm512_test_epi32_mask(one, _mm512_set1_epi32(1 << j)), x);
        }
#pragma GCC unroll 4
        for (int k = 0; k < (bits == 1 ? 2 : 4); ++k) {
          __mmask16 member;
          if constexpr (bits == 1) {
            const __m512i bit = _mm512_set1_epi32(1 << j);
            member = k ? _mm512_test_epi32_mask(one, bit) : _mm512_testn_epi32_mask(one, bit);
          } else {
            const __m512i low = _mm512_and_si512(two, _mm512_set1_epi32(3 << (2 * j)));
            member = _mm512_cmpeq_epi32_mask(low, _mm512_set1_epi32(k << (2 * j)));
          }
#pragma GCC unroll 2
          for (int h = 0; h < (bits == 3 ? 2 : 1); ++h)
            sum[k + 4 * h] = _mm512_mask_add_ps(sum[k + 4 * h], member, sum[k + 4 * h], high[h]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < chains * K; ++i) _mm512_store_ps(table + 16 * i, sums[i / K][i % K]);
  }

  KMQ_AVX512 static void flush(float* table, double* total) {
    for (int i = 0; i < chains * K; ++i) total[i % K] += take_lanes(table + 16 * i);
  }
};

// A table over pairs of indices, [4 copies][K * j + i][2].
template <int bits>
struct Pairs {
  static constexpr int K = 1 << bits, copy = 2 * K * K, floats = 4 * copy;
  static constexpr int64_t flush_after = bits == 3 ? 1024 : 8 * kChain;

  template <typename T>
  KMQ_AVX2 static void add(const T* values, const uint8_t* blocks, int64_t count, float* table) {
    for (; count > 0; --count, values += kBlock, blocks += kLanes * bits) {
      prefetch_block(values, blocks);
      // pair[b + 4 * c]: the indices of columns 32 * b + c and 32 * b + 16 + c
      alignas(16) uint8_t pairs[64];
      const uint8_t* pair = blocks;
      if constexpr (bits != 4) {
        __m128i field[8], word[4];
        add_fields<bits, 0>(blocks, field);
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) word[b] = _mm_or_si128(field[2 * b], _mm_slli_epi16(field[2 * b + 1], bits));
        const __m128i a = _mm_unpacklo_epi8(word[0], word[1]), c = _mm_unpackhi_epi8(word[0], word[1]);
        const __m128i d = _mm_unpacklo_epi8(word[2], word[3]), e = _mm_unpackhi_epi8(word[2], word[3]);
        __m128i* to = reinterpret_cast<__m128i*>(pairs);
        _mm_store_si128(to, _mm_unpacklo_epi16(a, d));
        _mm_store_si128(to + 1, _mm_unpackhi_epi16(a, d));
        _mm_store_si128(to + 2, _mm_unpacklo_epi16(c, e));
        _mm_store_si128(to + 3, _mm_unpackhi_epi16(c, e));
        pair = pairs;
      }
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const T* source = values + 32 * b + 8 * half;
          add_columns(load8(source), load8(source + 16), pair + 32 * half + b, table);
        }
    }
  }

  // Entry `first` of the copy at `table` += x[0:2], entry `second` of the next copy += x[2:4].
  KMQ_AVX2_INLINE static void add_two(float* table, size_t first, size_t second, __m128 x) {
    float *to = table + 2 * first, *next = table + copy + 2 * second;
    const __m128 low = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(to)));
    const __m128 sum = _mm_add_ps(_mm_loadh_pi(low, reinterpret_cast<const __m64*>(next)), x);
    _mm_storel_pi(reinterpret_cast<__m64*>(to), sum);
    _mm_storeh_pi(reinterpret_cast<__m64*>(next), sum);
  }

  // 16 columns of x in the first halves of entries, of y in the second; index[4 * c] is the entry of column c.
  KMQ_AVX2_INLINE static void add_columns(const __m256 x, const __m256 y, const uint8_t* index, float* table) {
    const __m256 low = _mm256_unpacklo_ps(x, y), high = _mm256_unpackhi_ps(x, y);  // columns 0 1 4 5 and 2 3 6 7
    add_two(table, index[0], index[4], _mm256_castps256_ps128(low));
    add_two(table + 2 * copy, index[8], index[12], _mm256_castps256_ps128(high));
    add_two(table, index[16], index[20], _mm256_extractf128_ps(low, 1));
    add_two(table + 2 * copy, index[24], index[28], _mm256_extractf128_ps(high, 1));
  }

  KMQ_AVX2 static void flush(float* table, double* total) {
    constexpr int registers = 2 * K / 8;  // of a row: entries (0, j) .. (K - 1, j)
    __m256 first[registers];
#pragma GCC unroll 4
    for (int i = 0; i < registers; ++i) first[i] = _mm256_setzero_ps();
    for (int j = 0; j < K; ++j) {
      __m256 second = _mm256_setzero_ps();
#pragma GCC unroll 4
      for (int i = 0; i < registers; ++i) {
        float* at = table + 2 * K * j + 8 * i;
        const __m256 sum = _mm256_add_ps(_mm256_add_ps(_mm256_load_ps(at), _mm256_load_ps(at + copy)),
                                         _mm256_add_ps(_mm256_load_ps(at + 2 * copy), _mm256_load_ps(at + 3 * copy)));
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) _mm256_store_ps(at + c * copy, _mm256_setzero_ps());
        first[i] = _mm256_add_ps(first[i], sum);
        second = _mm256_add_ps(second, sum);
      }
      float lanes[8];
      _mm256_storeu_ps(lanes, second);
      total[j] += (double(lanes[1]) + lanes[3]) + (double(lanes[5]) + lanes[7]);
    }
    for (int i = 0; i < registers; ++i) {
      float lanes[8];
      _mm256_storeu_ps(lanes, first[i]);
      for (int k = 0; k < 4; ++k) total[4 * i + k] += lanes[2 * k];
    }
  }
};

// 4 bits: of the 8 fields of a block, 4 by the table over pairs and 4 in registers, [K] of 16 floats. In the cache of a Zen 5, a value
// takes 0.15 ns by the table alone, 0.13 ns by registers alone and 0.105 ns by both. A few values, which a table is too large for, go by
// registers alone.
template <bool table_too>
struct Mixed16 {
  static constexpr int K = 16, own = table_too ? Pairs<4>::floats : 0, floats = own + 16 * K;
  static constexpr int64_t flush_after = 16 * kChain;

  template <typename T>
  KMQ_AVX512 static void add(const T* values, const uint8_t* blocks, int64_t count, float* table) {
    __m512 sums[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) sums[k] = _mm512_load_ps(table + own + 16 * k);
    for (; count > 0; --count, values += kBlock, blocks += kLanes * 4) {
      prefetch_block(values, blocks);
      const __m512i words = _mm512_loadu_si512(blocks);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const T* source = values + 32 * (i / 2) + 8 * (i % 2);
        add_field(values + 16 * (4 + i), words, 4 + i, sums);
        if constexpr (table_too) Pairs<4>::add_columns(load8(source), load8(source + 16), blocks + 32 * (i % 2) + i / 2, table);
        else add_field(values + 16 * i, words, i, sums);
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) _mm512_store_ps(table + own + 16 * k, sums[k]);
  }

  // Field j of the lanes: values are cleared where the upper two bits are others, and added under the masks of the lower two.
  template <typename T>
  KMQ_AVX512_INLINE static void add_field(const T* values, __m512i words, int j, __m512 sums[K]) {
    const __m512i x = _mm512_castps_si512(load16(values, 0xffff));
    const __m512i bit3 = _mm512_srai_epi32(_mm512_slli_epi32(words, 28 - 4 * j), 31);
    const __m512i bit2 = _mm512_srai_epi32(_mm512_slli_epi32(words, 29 - 4 * j), 31);
    const __m512i low = _mm512_and_si512(words, _mm512_set1_epi32(3 << (4 * j)));
    const __m512 high[4] = {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(x, bit3, bit2, 0x10)),
                            _mm512_castsi512_ps(_mm512_ternarylogic_epi32(x, bit3, bit2, 0x20)),
                            _mm512_castsi512_ps(_mm512_ternarylogic_epi32(x, bit3, bit2, 0x40)),
                            _mm512_castsi512_ps(_mm512_ternarylogic_epi32(x, bit3, bit2, 0x80))};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __mmask16 member = _mm512_cmpeq_epi32_mask(low, _mm512_set1_epi32(int(unsigned(k) << (4 * j))));
      // sum + 1 * x has the bits of sum + x. Zen 5 has units of their own for it, and leaves the adders to the comparisons.
#pragma GCC unroll 4
      for (int h = 0; h < 4; ++h)
        sums[4 * h + k] = _mm512_mask3_fmadd_ps(high[h], _mm512_set1_ps(1.0f), sums[4 * h + k], member);
    }
  }

  KMQ_AVX512 static void flush(float* table, double* total) {
    if constexpr (table_too) Pairs<4>::flush(table, total);
    for (int k = 0; k < K; ++k) total[k] += take_lanes(table + own + 16 * k);
  }
};

// A table over single indices, [4 copies][K].
template <int bits>
struct Singles {
  static constexpr int K = 1 << bits, floats = 4 * K;
  static constexpr int64_t flush_after = 4 * kChain;

  template <typename T>
  KMQ_AVX2 static void add(const T* values, const uint8_t* blocks, int64_t count, float* table) {
    for (; count > 0; --count, values += kBlock, blocks += kLanes * bits) {
      prefetch_block(values, blocks);
      __m128i field[8];
      add_fields<bits, 0>(blocks, field);
      alignas(16) uint8_t index[kBlock];
      alignas(32) float widened[kBlock];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) _mm_store_si128(reinterpret_cast<__m128i*>(index) + j, field[j]);
      const float* x = widened;
      if constexpr (sizeof(T) == 4) x = reinterpret_cast<const float*>(values);
      else
        for (int i = 0; i < kBlock; i += 8) _mm256_store_ps(widened + i, load8(values + i));
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) table[(i % 4 << bits) + index[i]] += x[i];
    }
  }

  static void flush(float* table, double* total) {
    for (int k = 0; k < K; ++k)
      total[k] += (double(table[k]) + table[K + k]) + (double(table[2 * K + k]) + table[3 * K + k]);
    std::memset(table, 0, floats * sizeof(float));
  }
};

#endif  // KMQ_X86

// The sums of one task. `total` [K] is not cleared; it is complete after finish().
class ClusterSums {
 public:
  // values: how many will be added, about.
  ClusterSums(int bits, double* total, int64_t values) : bits_(bits), few_(values < 4096), total_(total) {
#ifdef KMQ_X86
    if (avx2()) with_sums([&](auto sums) { std::memset(table_, 0, sums.floats * sizeof(float)); });
#endif
  }

  // total[k] += values [cols] whose index is k; `blocks` is a packed row, or a part of one that starts with a block. Rows of whole
  // blocks that follow each other are one row.
  template <typename T>
  void add(const T* values, const uint8_t* blocks, int64_t cols) {
#ifdef KMQ_X86
    if constexpr (sizeof(T) < 8) {
      if (avx2()) return with_sums([&](auto sums) { add_blocks(sums, values, blocks, cols); });
    }
#endif
    uint8_t index[kBlock];
    for (int64_t col = 0; col < cols; col += kBlock, blocks += kLanes * bits_) {
      decode_block(blocks, bits_, index);
      const int64_t count = std::min(cols - col, kBlock);
      for (int64_t i = 0; i < count; ++i) {
        if constexpr (sizeof(T) == 2) total_[index[i]] += static_cast<float>(values[col + i]);
        else total_[index[i]] += values[col + i];
      }
    }
  }

  void finish() {
#ifdef KMQ_X86
    if (held_ > 0) with_sums([&](auto sums) { flush(sums); });
#endif
  }

 private:
  int bits_;
  bool few_;
  double* total_;
#ifdef KMQ_X86
  // Calls f with an object of the type that does the sums here.
  template <typename F>
  void with_sums(const F& f) {
    if (avx512()) {
      switch (bits_) {
        case 1: return f(Masked16<1>{});
        case 2: return f(Masked16<2>{});
        case 3: return f(Masked16<3>{});
        case 4: return few_ ? f(Mixed16<false>{}) : f(Mixed16<true>{});
        default: break;
      }
    }
    switch (bits_) {
      case 1: return f(Masked8<1>{});
      case 2: return f(Masked8<2>{});
      case 3: return f(Pairs<3>{});
      case 4: return f(Pairs<4>{});
      case 5: return f(Singles<5>{});
      case 6: return f(Singles<6>{});
      case 7: return f(Singles<7>{});
      default: return f(Singles<8>{});
    }
  }

  template <typename Sums, typename T>
  void add_blocks(Sums sums, const T* values, const uint8_t* blocks, int64_t cols) {
    for (int64_t left = cols / kBlock; left > 0;) {
      const int64_t count = std::min(left, (sums.flush_after - held_) / kBlock);
      sums.add(values, blocks, count, table_);
      values += count * kBlock, blocks += count * kLanes * bits_, left -= count;
      hold(sums, count);
    }
    if (cols % kBlock == 0) return;
    T padded[kBlock];  // zeros have index 0
    std::memset(static_cast<void*>(padded), 0, sizeof padded);
    std::memcpy(static_cast<void*>(padded), static_cast<const void*>(values), cols % kBlock * sizeof(T));
    sums.add(padded, blocks, 1, table_);
    hold(sums, 1);
  }

  template <typename Sums>
  void hold(Sums sums, int64_t blocks) {
    held_ += blocks * kBlock;
    if (held_ == sums.flush_after) flush(sums);
  }

  template <typename Sums>
  void flush(Sums sums) {
    sums.flush(table_, total_);
    held_ = 0;
  }

  int64_t held_ = 0;  // values in the table: whole blocks, fewer than flush_after
  alignas(64) float table_[2048 + 256];
#endif
};

// How the rows of a weight are cut into tasks: each codebook's rows into pieces of at most `piece` rows. Depends on the shape
// only, so that sums do not depend on the number of threads.
struct Pieces {
  int64_t rows, group_rows, piece, per_group, count;
  Pieces(int64_t rows, int64_t group_rows, int64_t piece)
      : rows(rows), group_rows(std::min(group_rows, rows)), piece(piece),
        per_group((this->group_rows + piece - 1) / std::max<int64_t>(piece, 1)) {
    count = rows ? (rows + this->group_rows - 1) / this->group_rows * per_group : 0;
  }
  int64_t group(int64_t task) const { return task / per_group; }
  int64_t begin(int64_t task) const {
    return std::min(group(task) * group_rows + task % per_group * piece, end_of(group(task)));
  }
  int64_t end(int64_t task) const { return std::min(begin(task) + piece, end_of(group(task))); }

 private:
  int64_t end_of(int64_t group) const { return std::min(rows, (group + 1) * group_rows); }
};

}  // namespace kmq::cpu
