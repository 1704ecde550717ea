// Decoding with AVX2: registers of 8 columns. See decode.h.
#pragma once
#include "layout.h"

#ifdef KMQ_X86
namespace kmq::cpu {

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

}  // namespace kmq::cpu
#endif
