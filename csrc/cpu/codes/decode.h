// Reading packed indices, shared by the CPU kernels: the layout of kmq_kernels/packing.py.
//
// decode_block gives the indices of one block; decode_rows gives weights. The vector form of the latter, Decoder<bits>, hands
// registers of 8 neighbouring columns to a consumer, so that a kernel may use them without storing them.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../../kmq.h"
#include "../simd.h"

namespace kmq::cpu {

// Widths of the planes of an index of `bits` bits, low bits first; 0 ends the list.
inline const int* planes(int bits) {
  static const int table[9][4] = {{0}, {1, 0}, {2, 0}, {2, 1, 0}, {4, 0}, {4, 1, 0}, {4, 2, 0}, {4, 2, 1, 0}, {4, 4, 0}};
  return table[bits];
}

// The 128 indices of one block, in column order.
inline void decode_block(const uint8_t* block, int bits, uint8_t* index) {
  std::memset(index, 0, kBlock);
  int shift = 0;
  for (const int* width = planes(bits); *width; ++width) {
    const int per_byte = 8 / *width, mask = (1 << *width) - 1;
    for (int byte = 0; byte < *width; ++byte)
      for (int field = 0; field < per_byte; ++field)
        for (int lane = 0; lane < kLanes; ++lane) {
          const int column = (byte * per_byte + field) * kLanes + lane;
          index[column] |= ((block[lane * *width + byte] >> (field * *width)) & mask) << shift;
        }
    block += kLanes * *width;
    shift += *width;
  }
}

// Calls f(std::integral_constant<int, n>) for a run-time n from 1 to 8: bits, or rows of a small input.
template <typename F>
void with_small(int n, const F& f) {
  switch (n) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

// Which rows and columns of a weight to decode: rows begin .. begin + rows, or ids[begin ..] where ids are given; `cols` columns
// from first_col (a multiple of kBlock) on. Row i goes to out + i * ld.
struct Region {
  const int64_t* ids;
  int64_t begin, rows, first_col, cols, ld;
};

template <typename T>
void decode_rows_scalar(const Packed& packed, const T* codebook, int64_t group_rows, const Region& region, T* out) {
  uint8_t index[kBlock];
  const int64_t block_bytes = kLanes * packed.bits;
  for (int64_t i = 0; i < region.rows; ++i) {
    const int64_t row = region.ids ? region.ids[region.begin + i] : region.begin + i;
    const uint8_t* block = packed.data + row * packed.row_bytes() + region.first_col / kBlock * block_bytes;
    const T* book = codebook + ((row / group_rows) << packed.bits);
    T* to = out + i * region.ld;
    for (int64_t col = 0; col < region.cols; col += kBlock, block += block_bytes) {
      decode_block(block, packed.bits, index);
      const int64_t count = std::min(region.cols - col, kBlock);
      for (int64_t j = 0; j < count; ++j) to[col + j] = book[index[j]];
    }
  }
}

#ifdef KMQ_X86

// Of a 1-bit plane, the lanes of half a block: byte 4 * b + c of 128-bit lane l holds lane 8 * half + 4 * l + c.
KMQ_AVX2_INLINE __m256i lanes_of_one(const uint8_t* plane, int half) {
  const __m256i pick = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
  int64_t lanes;
  std::memcpy(&lanes, plane + 8 * half, 8);
  return _mm256_shuffle_epi8(_mm256_set1_epi64x(lanes), pick);
}

// The same of a 2-bit plane: byte b / 2 of the lane.
KMQ_AVX2_INLINE __m256i lanes_of_two(const uint8_t* plane, int half) {
  const __m256i pick = _mm256_setr_epi8(0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7, 8, 10, 12, 14, 8, 10, 12, 14, 9, 11, 13, 15, 9, 11,
                                        13, 15);
  const __m128i lanes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(plane + 16 * half));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(lanes), pick);
}

// Half of the indices of a block as two registers, one a nibble: byte 4 * b + c of 128-bit lane l holds the index of column
// 32 * b + 16 * nibble + 8 * half + 4 * l + c. One in-lane transpose of 4 x 4 bytes brings the 4-bit plane to this order, and
// four bytes of a float looked up in this order interleave to 8 neighbouring columns a register.
template <int bits>
KMQ_AVX2_INLINE void index_vectors(const uint8_t* block, int half, __m256i index[2]) {
  const __m256i transpose = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const uint8_t* plane = block;
  if (bits >= 4) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane + 32 * half)), transpose);
    index[0] = _mm256_and_si256(bytes, low);
    index[1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
    plane += 64;
  }
  if (bits == 8) {
    const __m256i high = _mm256_set1_epi8(-16);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(plane + 32 * half)), transpose);
    index[0] = _mm256_or_si256(index[0], _mm256_and_si256(_mm256_slli_epi16(bytes, 4), high));
    index[1] = _mm256_or_si256(index[1], _mm256_and_si256(bytes, high));
  }
  if (bits == 2 || bits == 3 || bits == 6 || bits == 7) {
    constexpr int at = bits >= 4 ? 4 : 0;
    const __m256i bytes = lanes_of_two(plane, half);  // field 2 * (b % 2) + nibble of the byte is meant
    const __m256i field = _mm256_srlv_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    const __m256i mask = _mm256_set1_epi8(3 << at);
    const __m256i even = _mm256_and_si256(_mm256_slli_epi32(field, at), mask);
    const __m256i odd = _mm256_and_si256(at ? _mm256_slli_epi32(field, at - 2) : _mm256_srli_epi32(field, 2), mask);
    index[0] = at ? _mm256_or_si256(index[0], even) : even;
    index[1] = at ? _mm256_or_si256(index[1], odd) : odd;
    plane += 32;
  }
  if (bits == 1 || bits == 3 || bits == 5 || bits == 7) {
    constexpr int at = bits - 1;
    const __m256i bytes = lanes_of_one(plane, half);
    const __m256i field = _mm256_srlv_epi32(bytes, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    const __m256i mask = _mm256_set1_epi8(1 << at);
    const __m256i even = _mm256_and_si256(_mm256_slli_epi32(field, at), mask);
    const __m256i odd = _mm256_and_si256(at ? _mm256_slli_epi32(field, at - 1) : _mm256_srli_epi32(field, 1), mask);
    index[0] = at ? _mm256_or_si256(index[0], even) : even;
    index[1] = at ? _mm256_or_si256(index[1], odd) : odd;
  }
}

// The indices of a block in column order.
template <int bits>
KMQ_AVX2_INLINE void indices_avx2(const uint8_t* block, uint8_t* index) {
  __m256i vectors[2][2];
  index_vectors<bits>(block, 0, vectors[0]);
  index_vectors<bits>(block, 1, vectors[1]);
#pragma GCC unroll 2
  for (int nibble = 0; nibble < 2; ++nibble) {
    const __m256i low = _mm256_unpacklo_epi32(vectors[0][nibble], vectors[1][nibble]);
    const __m256i high = _mm256_unpackhi_epi32(vectors[0][nibble], vectors[1][nibble]);
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      // Quadwords of a lane: (half 0, half 1) of b and b + 1; across the lanes: columns 4 further.
      const __m256i from = b < 2 ? low : high;
      const __m128i lanes = _mm_unpacklo_epi32(
          b % 2 ? _mm_unpackhi_epi64(_mm256_castsi256_si128(from), _mm256_castsi256_si128(from)) : _mm256_castsi256_si128(from),
          b % 2 ? _mm_unpackhi_epi64(_mm256_extracti128_si256(from, 1), _mm256_extracti128_si256(from, 1))
                : _mm256_extracti128_si256(from, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(index + 32 * b + 16 * nibble), lanes);
    }
  }
}

// Decodes blocks of `bits` bits with one codebook of 32-bit entries; every value is exact, bit for bit.
//   bits 1, 2   a register is the table, vpermilps looks up by a shifted dword
//   bits 3..6   the four bytes of the entries are tables of 16 of vpshufb. Above 4 bits, table t holds what the entries with the upper
//               bits t differ (xor) by from those with fewer of these bits; where an index lacks one of them, it gets the top bit,
//               for which vpshufb gives 0
//   bits 7, 8   scalar loads: vpgatherdd takes twice as long, 8 or 16 tables longer too
template <int bits>
struct Decoder {
  static constexpr int kTables = bits == 5 || bits == 6 ? 1 << (bits - 4) : 1;
  __m256i table[kTables][4];
  const float* book;

  KMQ_AVX2_INLINE void load(const float* codebook) {
    book = codebook;
    if constexpr (bits == 1) {
      int64_t both;
      std::memcpy(&both, codebook, 8);
      table[0][0] = _mm256_set1_epi64x(both);
    } else if constexpr (bits == 2) {
      table[0][0] = _mm256_castps_si256(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(codebook)));
    } else if constexpr (bits <= 6) {
      const __m128i bytes = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      for (int t = 0; t < kTables; ++t) {
        __m128i r[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          r[i] = _mm_setzero_si128();
          for (int part = 0; part <= t; ++part) {
            const float* entries = codebook + 16 * part + 4 * (bits == 3 ? i % 2 : i);
            if ((part & t) == part) r[i] = _mm_xor_si128(r[i], _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
          }
          r[i] = _mm_shuffle_epi8(r[i], bytes);
        }
        const __m128i a = _mm_unpacklo_epi32(r[0], r[1]), b = _mm_unpacklo_epi32(r[2], r[3]);
        const __m128i c = _mm_unpackhi_epi32(r[0], r[1]), d = _mm_unpackhi_epi32(r[2], r[3]);
        table[t][0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(a, b));
        table[t][1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(a, b));
        table[t][2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(c, d));
        table[t][3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(c, d));
      }
    }
  }

  // out(column, chain, weights) for the 16 registers of a block; chain 0..3 tells neighbouring calls apart.
  template <typename Out>
  KMQ_AVX2_INLINE void block(const uint8_t* block, Out& out) const {
    if constexpr (bits <= 2) {
      const __m256 entries = _mm256_castsi256_ps(table[0][0]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const uint8_t* lanes = block + 8 * bits * half;
        __m256i fields = bits == 2 ? _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes)))
                                   : _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes)));
#pragma GCC unroll 8
        for (int field = 0; field < 8; ++field)
          out(16 * field + 8 * half, field % 4, _mm256_permutevar_ps(entries, _mm256_srli_epi32(fields, bits * field)));
      }
    } else if constexpr (bits > 6) {
#pragma GCC unroll 1
      for (int half = 0; half < 2; ++half) {
        alignas(32) uint64_t at[2][4];
        __m256i index[2];
        index_vectors<bits>(block, half, index);
#pragma GCC unroll 2
        for (int nibble = 0; nibble < 2; ++nibble)
          _mm256_store_si256(reinterpret_cast<__m256i*>(at[nibble]),
                             _mm256_permutevar8x32_epi32(index[nibble], _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
        asm("" : "+m"(at));
#pragma GCC unroll 1
        for (int nibble = 0; nibble < 2; ++nibble)
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) out(32 * i + 16 * nibble + 8 * half, i, entries(at[nibble][i]));
      }
    } else {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256i index[2];
        index_vectors<kTables == 1 ? bits : 4>(block, half, index);
        if constexpr (bits == 3) asm("" : "+x"(index[0]), "+x"(index[1]));  // before any lookup, for the same reason as below
        __m256i upper = index[0];
        if constexpr (bits == 5) upper = lanes_of_one(block + 64, half);
        if constexpr (bits == 6) upper = lanes_of_two(block + 64, half);
#pragma GCC unroll 2
        for (int nibble = 0; nibble < 2; ++nibble) {
          __m256 weights[4];
          look_up(index[nibble], upper, nibble, weights);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) out(32 * i + 16 * nibble + 8 * half, i, weights[i]);
        }
      }
    }
  }

 private:
  // The weights of columns 32 * i + 16 * nibble + 8 * half + (0..7) for 4 values of i.
  KMQ_AVX2_INLINE void look_up(__m256i index, __m256i upper, int nibble, __m256 weights[4]) const {
    // Tables for which the sums leave no register are loaded again: so the compiler does not keep them and spill what it computes.
    const __m256i(*tables)[4] = table;
    if constexpr (bits != 4) asm("" : "+r"(tables));
    __m256i at[kTables] = {index}, plane[4];
    if constexpr (bits == 5) at[1] = _mm256_or_si256(index, lacking(upper, 1 << nibble, 4 << nibble, 16 << nibble, 64 << nibble));
    if constexpr (bits == 6) {
      const int even = 1 << 2 * nibble, odd = 16 << 2 * nibble;
      const __m256i second = lacking(upper, 2 * even, 2 * odd, 2 * even, 2 * odd);
      at[1] = _mm256_or_si256(index, lacking(upper, even, odd, even, odd));
      at[2] = _mm256_or_si256(index, second);
      at[3] = _mm256_or_si256(at[1], second);
    }
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      plane[p] = _mm256_shuffle_epi8(tables[0][p], at[0]);
#pragma GCC unroll 3
      for (int t = 1; t < kTables; ++t) {
        plane[p] = _mm256_xor_si256(plane[p], _mm256_shuffle_epi8(tables[t][p], at[t]));
        asm("" : "+x"(plane[p]));  // in this order: a tree of them would take more registers than there are
      }
    }
    const __m256i a = _mm256_unpacklo_epi8(plane[0], plane[1]), b = _mm256_unpacklo_epi8(plane[2], plane[3]);
    const __m256i c = _mm256_unpackhi_epi8(plane[0], plane[1]), d = _mm256_unpackhi_epi8(plane[2], plane[3]);
    weights[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(a, b));
    weights[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(a, b));
    weights[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(c, d));
    weights[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(c, d));
  }

  // The entries at the 8 bytes of `index`.
  KMQ_AVX2_INLINE __m256 entries(uint64_t index) const {
    const uint32_t a = index & 0xffff, b = index >> 16 & 0xffff, c = index >> 32 & 0xffff, d = index >> 48;
    return _mm256_setr_ps(book[a & 255], book[a >> 8], book[b & 255], book[b >> 8], book[c & 255], book[c >> 8], book[d & 255], book[d >> 8]);
  }

  // All ones in the bytes of `lanes` that lack a bit: a in the bytes of dwords 0 and 4, b in those of 1 and 5, ...
  KMQ_AVX2_INLINE static __m256i lacking(__m256i lanes, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    constexpr uint32_t bytes = 0x01010101;
    const __m128i bit = _mm_setr_epi32(int(a * bytes), int(b * bytes), int(c * bytes), int(d * bytes));
    return _mm256_cmpeq_epi8(_mm256_and_si256(lanes, _mm256_broadcastsi128_si256(bit)), _mm256_setzero_si256());
  }
};

// Stores decoded registers: as they are, or the low half of each dword.
struct Store32 {
  float* to;
  KMQ_AVX2_INLINE void operator()(int column, int, __m256 x) const { _mm256_storeu_ps(to + column, x); }
};

struct Store16 {
  uint16_t* to;
  KMQ_AVX2_INLINE void operator()(int column, int, __m256 x) const {
    const __m256i u = _mm256_castps_si256(x);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + column), words);
  }
};

template <int bits, typename T>
KMQ_AVX2 void decode_rows_avx2(const Packed& packed, const T* codebook, int64_t group_rows, const Region& region, T* out) {
  using Store = std::conditional_t<sizeof(T) == 2, Store16, Store32>;
  const int64_t row_bytes = packed.row_bytes();
  const T* book = nullptr;
  float entries[1 << bits];  // a codebook of 16-bit entries, each in the low half of a dword
  Decoder<bits> decoder{};
  for (int64_t i = 0; i < region.rows; ++i) {
    const int64_t row = region.ids ? region.ids[region.begin + i] : region.begin + i;
    const T* row_book = codebook + ((row / group_rows) << bits);
    if (row_book != book) {
      book = row_book;
      if constexpr (sizeof(T) == 2) {
        for (int k = 0; k < 1 << bits; ++k) entries[k] = float_of(book[k]);
        decoder.load(entries);
      } else {
        decoder.load(book);
      }
    }
    const uint8_t* block = packed.data + row * row_bytes + region.first_col / kBlock * (kLanes * bits);
    T* to = out + i * region.ld;
    int64_t col = 0;
    for (; col + kBlock <= region.cols; col += kBlock, block += kLanes * bits) {
      Store store{to + col};
      decoder.block(block, store);
    }
    if (col < region.cols) {
      T last[kBlock];
      Store store{last};
      decoder.block(block, store);
      std::memcpy(to + col, last, (region.cols - col) * sizeof(T));
    }
  }
}

// Keeps x in its register. GCC 12 else reads a block again for each of its 8 fields, which waits for memory 8 times where it is not
// in the cache: 3 rows of input took 1.7 times as long.
KMQ_AVX512_INLINE __m512i in_register(__m512i x) {
  asm("" : "+v"(x));
  return x;
}

// The planes of a block. Up to 5 bits a 32-bit lane c is lane c of the layout. From 6 bits on it is two words: word c % 4 of 128-bit
// lane c / 4 begins with field 0, word c % 4 + 4 with field 4; what is looked up for the words interleaves to columns in order.
template <int bits>
struct Planes512 {
  static constexpr bool kWords = bits >= 6;
  __m512i four, high, two, one;  // `high` is the second 4-bit plane of 8 bits

  KMQ_AVX512_INLINE explicit Planes512(const uint8_t* block) {
    if constexpr (bits >= 4) four = four_bits(block);
    if constexpr (bits == 8) high = four_bits(block + 64);
    const uint8_t* rest = block + (bits >= 4 ? 64 : 0);
    if constexpr (bits == 2 || bits == 3 || bits == 6 || bits == 7) {
      const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rest));
      if constexpr (kWords) {
        const __m256i split = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
        two = _mm512_cvtepu8_epi16(_mm256_shuffle_epi8(lanes, split));
      } else {
        two = _mm512_cvtepu16_epi32(lanes);
      }
    }
    if constexpr (bits % 2 == 1) {
      const __m128i lanes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rest + (bits == 3 || bits == 7 ? 32 : 0)));
      if constexpr (kWords) {
        const __m256i twice = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(lanes), _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
        one = _mm512_srlv_epi16(_mm512_cvtepu8_epi16(twice), _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0, 0, 0, 4, 4, 4, 4)));
      } else {
        one = _mm512_cvtepu8_epi32(lanes);
      }
    }
  }

  KMQ_AVX512_INLINE static __m512i four_bits(const uint8_t* plane) {
    const __m512i lanes = in_register(_mm512_loadu_si512(plane));
    if constexpr (!kWords) return lanes;
    return _mm512_shuffle_epi8(lanes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)));
  }

  // Bits from `from` on moved to bit `to`; neighbouring fields come along.
  KMQ_AVX512_INLINE static __m512i move(__m512i x, int from, int to) {
    if (from == to) return x;
    if constexpr (kWords) return from > to ? _mm512_srli_epi16(x, from - to) : _mm512_slli_epi16(x, to - from);
    return from > to ? _mm512_srli_epi32(x, from - to) : _mm512_slli_epi32(x, to - from);
  }

  // Bits of `low` where the mask is set, of `high` elsewhere.
  KMQ_AVX512_INLINE static __m512i join(int mask, __m512i low, __m512i high) {
    return _mm512_ternarylogic_epi32(kWords ? _mm512_set1_epi16(mask) : _mm512_set1_epi32(mask), low, high, 0xca);
  }

  // The indices of field `field`, of words also of field + 4, below bits that mean nothing.
  KMQ_AVX512_INLINE __m512i index(int field) const {
    if constexpr (bits == 1) return move(one, field, 0);
    if constexpr (bits == 2) return move(two, 2 * field, 0);
    if constexpr (bits == 3) return join(3, move(two, 2 * field, 0), move(one, field, 2));
    if constexpr (bits == 4) return move(four, 4 * field, 0);
    if constexpr (bits == 5) return join(15, move(four, 4 * field, 0), move(one, field, 4));
    if constexpr (bits == 6) return join(15, move(four, 4 * field, 0), move(two, 2 * field, 4));
    if constexpr (bits == 7) return join(15, move(four, 4 * field, 0), join(48, move(two, 2 * field, 4), move(one, field, 6)));
    if constexpr (bits == 8) return join(15, move(four, 4 * field, 0), move(high, 4 * field, 4));
  }
};

// As Decoder, with registers of 16 columns. The lookups ignore the bits above an index, so that a field needs no mask.
//   bits 1..4   vpermps looks up 16 entries; up to 3 bits the table is repeated
//   bits 5      vpermt2ps looks up 32
//   bits 6..8   vpermt2w looks up 64 low halves of entries, and 64 high halves, for two registers at once; masks choose among tables
template <int bits>
struct Decoder512 {
  static constexpr int kTables = bits <= 4 ? 1 : 1 << (bits - 4);
  __m512i table[kTables];  // from 6 bits on: low halves of 32 entries a register, then their high halves

  KMQ_AVX512_INLINE void load(const float* codebook) {
    if constexpr (bits < 4) {
      const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i entry = _mm512_and_si512(lanes, _mm512_set1_epi32((1 << bits) - 1));
      table[0] = _mm512_permutexvar_epi32(entry, _mm512_maskz_loadu_epi32(first_lanes(1 << bits), codebook));
    } else {
#pragma GCC unroll 16
      for (int t = 0; t < kTables; ++t) {
        if constexpr (bits <= 5) {
          table[t] = _mm512_loadu_si512(codebook + 16 * t);
        } else {
          const int first = t % (kTables / 2) * 32, shift = t < kTables / 2 ? 0 : 16;
          const __m512i a = _mm512_loadu_si512(codebook + first), b = _mm512_loadu_si512(codebook + first + 16);
          table[t] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(a, shift))),
                                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, shift)), 1);
        }
      }
    }
  }

  // Of entries, or of halves of them from table `first` on.
  KMQ_AVX512_INLINE __m512i look_up(__m512i index, int first = 0) const {
    if constexpr (bits <= 4) {
      return _mm512_permutexvar_epi32(index, table[0]);
    } else if constexpr (bits == 5) {
      return _mm512_permutex2var_epi32(table[0], index, table[1]);
    } else {
      __m512i found[kTables / 4];
#pragma GCC unroll 4
      for (int t = 0; t < kTables / 4; ++t) found[t] = _mm512_permutex2var_epi16(table[first + 2 * t], index, table[first + 2 * t + 1]);
#pragma GCC unroll 2
      for (int bit = 6; bit < bits; ++bit) {
        const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(1 << bit));
#pragma GCC unroll 2
        for (int t = 0; t < 2; ++t)
          if (t < kTables >> (bit - 3)) found[t] = _mm512_mask_mov_epi16(found[2 * t], upper, found[2 * t + 1]);
      }
      return found[0];
    }
  }

  // out(column, chain, weights) for the 8 registers of a block; chain 0..7 tells neighbouring calls apart.
  template <typename Out>
  KMQ_AVX512_INLINE void block(const uint8_t* block, Out& out) const {
    const Planes512<bits> planes(block);
#pragma GCC unroll 8
    for (int field = 0; field < (bits <= 5 ? 8 : 4); ++field) {
      const __m512i index = planes.index(field);
      if constexpr (bits <= 5) {
        out(16 * field, field, _mm512_castsi512_ps(look_up(index)));
      } else {
        const __m512i low = look_up(index), high = look_up(index, kTables / 2);
        out(16 * field, 2 * field, _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high)));
        out(16 * field + 64, 2 * field + 1, _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high)));
      }
    }
  }
};

// Stores the first `count` decoded columns of a block, as they are or the low half of each dword.
struct Store512 {
  void* to;
  int64_t count;
  int size;
  KMQ_AVX512_INLINE void operator()(int column, int, __m512 x) const {
    const __mmask16 mask = first_lanes(std::max<int64_t>(0, count - column));
    if (size == 4) _mm512_mask_storeu_ps(static_cast<float*>(to) + column, mask, x);
    else _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + column, mask, _mm512_cvtepi32_epi16(_mm512_castps_si512(x)));
  }
};

template <int bits, typename T>
KMQ_AVX512 void decode_rows_avx512(const Packed& packed, const T* codebook, int64_t group_rows, const Region& region, T* out) {
  const int64_t row_bytes = packed.row_bytes();
  const T* book = nullptr;
  float entries[1 << bits];  // a codebook of 16-bit entries, each in the low half of a dword
  Decoder512<bits> decoder;
  for (int64_t i = 0; i < region.rows; ++i) {
    const int64_t row = region.ids ? region.ids[region.begin + i] : region.begin + i;
    const T* row_book = codebook + ((row / group_rows) << bits);
    if (row_book != book) {
      book = row_book;
      if constexpr (sizeof(T) == 2) {
        for (int k = 0; k < 1 << bits; ++k) entries[k] = float_of(book[k]);
        decoder.load(entries);
      } else {
        decoder.load(book);
      }
    }
    const uint8_t* block = packed.data + row * row_bytes + region.first_col / kBlock * (kLanes * bits);
    T* to = out + i * region.ld;
    int64_t col = 0;
#pragma GCC unroll 1
    for (; col + kBlock <= region.cols; col += kBlock, block += kLanes * bits) {
      Store512 store{to + col, kBlock, sizeof(T)};
      decoder.block(block, store);
    }
    if (col < region.cols) {
      Store512 store{to + col, region.cols - col, sizeof(T)};
      decoder.block(block, store);
    }
  }
}

// Turns a plane of 16 rows: lane r of block c of `turned` is lane c of row r, so that decoding block c yields, field by field,
// column 16 * field + c of 16 rows. `bytes` is the width of a lane; rows are `ld` apart, blocks of `turned` `turned_ld`.
template <int bytes>
KMQ_AVX2_INLINE void turn_plane(const uint8_t* const rows[16], int64_t offset, uint8_t* turned, int64_t turned_ld) {
  constexpr int side = 16 / bytes;  // a register holds so many lanes
#pragma GCC unroll 1
  for (int first_row = 0; first_row < 16; first_row += side)
#pragma GCC unroll 1
    for (int first_lane = 0; first_lane < 16; first_lane += side) {
      __m128i r[side], half[side];
#pragma GCC unroll 16
      for (int i = 0; i < side; ++i)
        r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[first_row + i] + offset + first_lane * bytes));
      // Each round interleaves row i with row i + side / 2, which is a perfect shuffle; log2(side) rounds transpose.
#pragma GCC unroll 4
      for (int round = 1; round < side; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < side / 2; ++i) {
          if constexpr (bytes == 4) {
            half[2 * i] = _mm_unpacklo_epi32(r[i], r[i + side / 2]);
            half[2 * i + 1] = _mm_unpackhi_epi32(r[i], r[i + side / 2]);
          } else if constexpr (bytes == 2) {
            half[2 * i] = _mm_unpacklo_epi16(r[i], r[i + side / 2]);
            half[2 * i + 1] = _mm_unpackhi_epi16(r[i], r[i + side / 2]);
          } else {
            half[2 * i] = _mm_unpacklo_epi8(r[i], r[i + side / 2]);
            half[2 * i + 1] = _mm_unpackhi_epi8(r[i], r[i + side / 2]);
          }
        }
#pragma GCC unroll 16
        for (int i = 0; i < side; ++i) r[i] = half[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < side; ++i)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(turned + (first_lane + i) * turned_ld + first_row * bytes), r[i]);
    }
}

// The block of 16 rows from `row` on that begins at byte `offset` of a row, to 16 turned blocks; row `last` stands for rows after it.
template <int bits>
KMQ_AVX2 void turn_blocks(const Packed& packed, int64_t row, int64_t last, int64_t offset, uint8_t* turned) {
  constexpr int64_t size = kLanes * bits, narrow = kLanes * (bits - 1);
  const uint8_t* rows[16];
  for (int64_t i = 0; i < 16; ++i) rows[i] = packed.data + std::min(row + i, last) * packed.row_bytes() + offset;
  if constexpr (bits >= 4) turn_plane<4>(rows, 0, turned, size);
  if constexpr (bits == 8) turn_plane<4>(rows, 64, turned + 64, size);
  if constexpr (bits == 2 || bits == 3) turn_plane<2>(rows, 0, turned, size);
  if constexpr (bits == 6 || bits == 7) turn_plane<2>(rows, 64, turned + 64, size);
  if constexpr (bits % 2 == 1) turn_plane<1>(rows, narrow, turned + narrow, size);
}

// Stores columns c, c + 16, .. of 16 rows to the steps of a panel: all 8, or those that exist.
template <int width, bool whole>
struct StoreTurned {
  float* to;      // of step c
  int64_t depth;  // steps from c on
  KMQ_AVX2_INLINE void operator()(int column, int, __m256 x) const {
    if (whole || column / 16 * 16 < depth) _mm256_storeu_ps(to + column / 16 * 16 * width + column % 16, x);
  }
  KMQ_AVX512_INLINE void operator()(int column, int, __m512 x) const {
    if (whole || column < depth) _mm512_storeu_ps(to + column * width, x);
  }
};

template <int bits, int width>
KMQ_AVX2 void decode_panel_avx2(const Packed& packed, const float* book, int64_t row, int64_t rows, int64_t first_col, int64_t depth,
                                float* panel) {
  constexpr int64_t size = kLanes * bits;
  alignas(64) uint8_t turned[width / 16][kLanes * size];
  Decoder<bits> decoder{};
  decoder.load(book);
  for (int64_t k = 0; k < depth; k += kBlock) {
    for (int64_t i = 0; i < rows; i += 16) turn_blocks<bits>(packed, row + i, row + rows - 1, (first_col + k) / kBlock * size, turned[i / 16]);
    for (int64_t i = 0; i < rows; i += 16)
#pragma GCC unroll 1
      for (int c = 0; c < kLanes; ++c) {
        float* const to = panel + (k + c) * width + i;
        if (k + kBlock <= depth) {
          StoreTurned<width, true> store{to, 0};
          decoder.block(turned[i / 16] + c * size, store);
        } else {
          StoreTurned<width, false> store{to, depth - k - c};
          decoder.block(turned[i / 16] + c * size, store);
        }
      }
  }
}

template <int bits, int width>
KMQ_AVX512 void decode_panel_avx512(const Packed& packed, const float* book, int64_t row, int64_t rows, int64_t first_col,
                                    int64_t depth, float* panel) {
  constexpr int64_t size = kLanes * bits;
  alignas(64) uint8_t turned[width / 16][kLanes * size];
  Decoder512<bits> decoder;
  decoder.load(book);
  for (int64_t k = 0; k < depth; k += kBlock) {
    for (int64_t i = 0; i < rows; i += 16) turn_blocks<bits>(packed, row + i, row + rows - 1, (first_col + k) / kBlock * size, turned[i / 16]);
    for (int64_t i = 0; i < rows; i += 16)
#pragma GCC unroll 1
      for (int c = 0; c < kLanes; ++c) {
        float* const to = panel + (k + c) * width + i;
        if (k + kBlock <= depth) {
          StoreTurned<width, true> store{to, 0};
          decoder.block(turned[i / 16] + c * size, store);
        } else {
          StoreTurned<width, false> store{to, depth - k - c};
          decoder.block(turned[i / 16] + c * size, store);
        }
      }
  }
}

#endif  // KMQ_X86

// Weights of a region, exact. T is float, double, or uint16_t for the bits of bf16 and fp16.
template <typename T>
void decode_rows(const Packed& packed, const T* codebook, int64_t group_rows, const Region& region, T* out) {
#ifdef KMQ_X86
  if constexpr (sizeof(T) <= 4) {
    if (avx512())
      return with_small(packed.bits, [&](auto bits) { decode_rows_avx512<bits()>(packed, codebook, group_rows, region, out); });
    if (avx2())
      return with_small(packed.bits, [&](auto bits) { decode_rows_avx2<bits()>(packed, codebook, group_rows, region, out); });
  }
#endif
  decode_rows_scalar(packed, codebook, group_rows, region, out);
}

// panel[k * width + i] = weight(row + i, first_col + k) for i < rows <= width and k < depth, where one codebook serves all the rows;
// the other lanes hold anything. Returns false where it does not, or on the scalar path.
template <int width>
bool decode_panel(const Packed& packed, const float* codebook, int64_t group_rows, int64_t row, int64_t rows, int64_t first_col,
                  int64_t depth, float* panel) {
#ifdef KMQ_X86
  if (!avx2() || row / group_rows != (row + rows - 1) / group_rows) return false;
  const float* book = codebook + ((row / group_rows) << packed.bits);
  with_small(packed.bits, [&](auto bits) {
    if (avx512()) decode_panel_avx512<bits(), width>(packed, book, row, rows, first_col, depth, panel);
    else decode_panel_avx2<bits(), width>(packed, book, row, rows, first_col, depth, panel);
  });
  return true;
#else
  return false;
#endif
}

}  // namespace kmq::cpu
