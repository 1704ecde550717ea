// Sums of values by their packed index: the inner loop of every codebook gradient.
//
// Vector path, fp32 partial sums by the number of bits:
//
//   1, 2   one register per centroid; a value is added under the mask "index == k"
//   3, 4   a table over PAIRS of indices: entry (i, j) holds the sums of the first and of the second values whose indices were
//          i and j. Two values cost one load, add and store of 8 bytes.
//   5 .. 8 a table over single indices
//
// Neighbouring values go to different copies of a table, so that an addition seldom waits for the store of the one before.
// After kFlush values the fp32 sums are added to the fp64 sums, which bounds the rounding error whatever the size of a tensor.
// fp64 values, and all values on the scalar path, are added to the fp64 sums directly.
//
// The order of additions depends on the sequence of add() calls alone, so each task owns one ClusterSums.
#pragma once
#include <algorithm>

#include "decode.h"
#include "simd.h"

namespace kmq::cpu {

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

template <int bits>
KMQ_AVX2_INLINE void add_block_masked(const float* values, const __m128i field[8], __m256 sums[2][1 << bits]) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m128i bytes = half ? _mm_unpackhi_epi64(field[j], field[j]) : field[j];
      const __m256i index = _mm256_cvtepu8_epi32(bytes);
      const __m256 x = _mm256_loadu_ps(values + 16 * j + 8 * half);
#pragma GCC unroll 4
      for (int k = 0; k < 1 << bits; ++k) {
        const __m256 member = _mm256_castsi256_ps(_mm256_cmpeq_epi32(index, _mm256_set1_epi32(k)));
        sums[half][k] = _mm256_add_ps(sums[half][k], _mm256_and_ps(member, x));
      }
    }
}

// first[0:2] += x[0:2], second[0:2] += x[2:4], for entries of different copies of the table.
KMQ_AVX2_INLINE void add_two(float* first, float* second, __m128 x) {
  const __m128 low = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first)));
  const __m128 sum = _mm_add_ps(_mm_loadh_pi(low, reinterpret_cast<const __m64*>(second)), x);
  _mm_storel_pi(reinterpret_cast<__m64*>(first), sum);
  _mm_storeh_pi(reinterpret_cast<__m64*>(second), sum);
}

template <int bits, typename T>
KMQ_AVX2_INLINE void add_block_pairs(const T* values, const __m128i field[8], float* table) {
  alignas(16) uint8_t pair[64];  // pair[16 * b + c]: indices of columns 32 * b + c and 32 * b + 16 + c
#pragma GCC unroll 4
  for (int b = 0; b < 4; ++b)
    _mm_store_si128(reinterpret_cast<__m128i*>(pair) + b, _mm_or_si128(field[2 * b], _mm_slli_epi16(field[2 * b + 1], bits)));
  float* other = table + (2 << (2 * bits));
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const T* source = values + i / 2 * 32 + i % 2 * 8;
    const uint8_t* at = pair + 8 * i;
    const __m256 x = load8(source), y = load8(source + 16);
    const __m256 low = _mm256_unpacklo_ps(x, y), high = _mm256_unpackhi_ps(x, y);  // lanes 0 1 4 5 and 2 3 6 7
    add_two(table + 2 * at[0], other + 2 * at[1], _mm256_castps256_ps128(low));
    add_two(table + 2 * at[2], other + 2 * at[3], _mm256_castps256_ps128(high));
    add_two(table + 2 * at[4], other + 2 * at[5], _mm256_extractf128_ps(low, 1));
    add_two(table + 2 * at[6], other + 2 * at[7], _mm256_extractf128_ps(high, 1));
  }
}

template <int bits>
KMQ_AVX2_INLINE void add_block_single(const float* values, const __m128i field[8], float* table) {
  alignas(16) uint8_t index[kBlock];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) _mm_store_si128(reinterpret_cast<__m128i*>(index) + j, field[j]);
#pragma GCC unroll 8
  for (int i = 0; i < kBlock; ++i) table[(i % 4 << bits) + index[i]] += values[i];
}

// table += values [cols] by the indices of `blocks`; a tail is padded with zeros, which have index 0.
template <int bits, typename T>
KMQ_AVX2 void add_values(const T* values, const uint8_t* blocks, int64_t cols, float* table) {
  constexpr int masked = bits <= 2 ? 1 << bits : 1;
  __m256 sums[2][masked];
  if constexpr (bits <= 2)
    for (int i = 0; i < 2 * masked; ++i) sums[i / masked][i % masked] = _mm256_load_ps(table + 8 * i);
  for (int64_t col = 0; col < cols; col += kBlock, blocks += kLanes * bits) {
    T padded[kBlock];
    const T* source = values + col;
    if (cols - col < kBlock) {
      std::memset(static_cast<void*>(padded), 0, sizeof padded);
      std::memcpy(static_cast<void*>(padded), static_cast<const void*>(source), (cols - col) * sizeof(T));
      source = padded;
    }
    __m128i field[8];
    add_fields<bits, 0>(blocks, field);
    if constexpr (bits == 3 || bits == 4) {
      add_block_pairs<bits>(source, field, table);
    } else {
      alignas(32) float widened[kBlock];
      const float* x = widened;
      if constexpr (sizeof(T) == 4) x = reinterpret_cast<const float*>(source);
      else
        for (int i = 0; i < kBlock; i += 8) _mm256_store_ps(widened + i, load8(source + i));
      if constexpr (bits <= 2) add_block_masked<bits>(x, field, sums);
      else add_block_single<bits>(x, field, table);
    }
  }
  if constexpr (bits <= 2)
    for (int i = 0; i < 2 * masked; ++i) _mm256_store_ps(table + 8 * i, sums[i / masked][i % masked]);
}

// total [K] += the sums in `table`, which is cleared.
template <int bits>
KMQ_AVX2 void flush_table(float* table, double* total) {
  constexpr int K = 1 << bits;
  if constexpr (bits <= 2) {
    for (int i = 0; i < 2 * K; ++i)
      for (int lane = 0; lane < 8; ++lane) total[i % K] += table[8 * i + lane];
    std::memset(table, 0, 16 * K * sizeof(float));
  } else if constexpr (bits <= 4) {
    float first[2 * K] = {};
    for (int j = 0; j < K; ++j) {
      float* row = table + 2 * K * j;
      float second[8] = {};
      for (int i = 0; i < 2 * K; i += 8)
        for (int lane = 0; lane < 8; ++lane) {
          const float sum = row[i + lane] + row[2 * K * K + i + lane];
          first[i + lane] += sum;
          second[lane] += sum;
        }
      total[j] += (double(second[1]) + second[3]) + (double(second[5]) + second[7]);
    }
    for (int i = 0; i < K; ++i) total[i] += first[2 * i];
    std::memset(table, 0, 4 * K * K * sizeof(float));
  } else {
    for (int k = 0; k < K; ++k)
      total[k] += (double(table[k]) + table[K + k]) + (double(table[2 * K + k]) + table[3 * K + k]);
    std::memset(table, 0, 4 * K * sizeof(float));
  }
}

#endif  // KMQ_X86

// The sums of one task. `total` [K] is not cleared; it is complete after finish().
class ClusterSums {
 public:
  ClusterSums(int bits, double* total) : bits_(bits), total_(total) {
#ifdef KMQ_X86
    std::memset(table_, 0, table_floats() * sizeof(float));
#endif
  }

  // total[k] += values [cols] whose index is k; `blocks` is a packed row, or a part of one that starts with a block.
  template <typename T>
  void add(const T* values, const uint8_t* blocks, int64_t cols) {
#ifdef KMQ_X86
    if constexpr (sizeof(T) < 8) {
      if (avx2()) {
        switch (bits_) {
          case 1: add_values<1>(values, blocks, cols, table_); break;
          case 2: add_values<2>(values, blocks, cols, table_); break;
          case 3: add_values<3>(values, blocks, cols, table_); break;
          case 4: add_values<4>(values, blocks, cols, table_); break;
          case 5: add_values<5>(values, blocks, cols, table_); break;
          case 6: add_values<6>(values, blocks, cols, table_); break;
          case 7: add_values<7>(values, blocks, cols, table_); break;
          default: add_values<8>(values, blocks, cols, table_);
        }
        held_ += cols;
        if (held_ >= kFlush) finish();
        return;
      }
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
    if (held_ == 0) return;
    held_ = 0;
    switch (bits_) {
      case 1: flush_table<1>(table_, total_); break;
      case 2: flush_table<2>(table_, total_); break;
      case 3: flush_table<3>(table_, total_); break;
      case 4: flush_table<4>(table_, total_); break;
      case 5: flush_table<5>(table_, total_); break;
      case 6: flush_table<6>(table_, total_); break;
      case 7: flush_table<7>(table_, total_); break;
      default: flush_table<8>(table_, total_);
    }
#endif
  }

 private:
  int bits_;
  double* total_;
#ifdef KMQ_X86
  static constexpr int64_t kFlush = 8192;
  int64_t table_floats() const { return bits_ <= 2 ? 16 << bits_ : bits_ <= 4 ? 4 << (2 * bits_) : 4 << bits_; }
  int64_t held_ = 0;
  alignas(32) float table_[1024];
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
