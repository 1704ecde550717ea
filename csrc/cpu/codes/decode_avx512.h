// Decoding with AVX-512: registers of 16 columns. See decode.h.
#pragma once
#include "layout.h"

#ifdef KMQ_X86
namespace kmq::cpu {

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

}  // namespace kmq::cpu
#endif
