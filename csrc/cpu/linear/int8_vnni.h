// The integer linear layer with AVX-512 VNNI, see int8.h.
//
// A panel holds 32 rows of the weight, columns by fours in the order of groups: entry of (row r, group g, field i) at byte
// [g][r / 16][r % 16][i], so that a tile reads it as a stream, 16 rows a register, and broadcasts 4 bytes of an input row. A row is
// decoded in its own order, a register of 64 columns a part of a block, through its own table; 16 rows of these are turned.
#pragma once
#include "../codes/layout.h"
#include "../encoder/activation.h"
#include "int8.h"

#ifdef KMQ_X86
namespace kmq::cpu {

// The indices of a block as bytes: byte i of lane l of part p is column 16 * (2 i + p) + l. Bits above an index mean nothing.
template <int bits>
struct IndexBytes {
  __m512i four, high, two, one;

  KMQ_VNNI_INLINE explicit IndexBytes(const uint8_t* block) {
    if constexpr (bits >= 4) four = _mm512_loadu_si512(block);
    if constexpr (bits == 8) high = _mm512_loadu_si512(block + 64);
    const uint8_t* rest = block + (bits >= 4 ? 64 : 0);
    // Six bits up, so that a field can come down to any bit of its byte.
    if constexpr (bits == 2 || bits == 3 || bits == 6 || bits == 7)
      two = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rest))), 6);
    if constexpr (bits % 2 == 1)
      one = _mm512_slli_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rest + (bits == 3 || bits == 7 ? 32 : 0)))), 6);
  }

  // Where vpmultishiftqb finds the fields of part p, `width` bits each, to bring them to bit `to`.
  static constexpr int64_t places(int width, int p, int to) {
    uint64_t control = 0;
    for (int byte = 0; byte < 8; ++byte) control |= uint64_t(byte / 4 * 32 + 6 - to + width * (byte % 4 * 2 + p)) << (8 * byte);
    return int64_t(control);
  }

  template <int width, int p, int to>
  KMQ_VNNI_INLINE static __m512i fields(__m512i plane) {
    constexpr int64_t control = places(width, p, to);
    return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(control), plane);
  }

  // Bits of `low` where the mask is set, of `above` elsewhere.
  template <int mask>
  KMQ_VNNI_INLINE static __m512i join(__m512i low, __m512i above) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(mask), low, above, 0xca);
  }

  template <int p>
  KMQ_VNNI_INLINE __m512i index() const {
    if constexpr (bits == 1) return fields<1, p, 0>(one);
    if constexpr (bits == 2) return fields<2, p, 0>(two);
    if constexpr (bits == 3) return join<3>(fields<2, p, 0>(two), fields<1, p, 2>(one));
    if constexpr (bits >= 4) {
      const __m512i low = p ? _mm512_srli_epi32(four, 4) : four;
      if constexpr (bits == 4) return low;
      if constexpr (bits == 5) return join<15>(low, fields<1, p, 4>(one));
      if constexpr (bits == 6) return join<15>(low, fields<2, p, 4>(two));
      if constexpr (bits == 7) return join<15>(low, join<48>(fields<2, p, 4>(two), fields<1, p, 6>(one)));
      if constexpr (bits == 8) return join<15>(low, p ? high : _mm512_slli_epi32(high, 4));
    }
  }
};

// Entries of a table at byte indices. vpermb looks at 6 bits of an index, so that a smaller table is repeated.
template <int bits>
KMQ_VNNI_INLINE __m512i entries(const int8_t* table, __m512i index) {
  if constexpr (bits <= 6) {
    __m512i all;
    if constexpr (bits == 6) {
      all = _mm512_loadu_si512(table);
    } else if constexpr (bits == 5) {
      all = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
    } else if constexpr (bits == 4) {
      all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    } else {
      int64_t eight = 0;
      std::memcpy(&eight, table, 1 << bits);
      all = bits == 3 ? _mm512_set1_epi64(eight) : bits == 2 ? _mm512_set1_epi32(int32_t(eight)) : _mm512_set1_epi16(int16_t(eight));
    }
    return _mm512_permutexvar_epi8(index, all);
  } else {
    const __m512i below = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 64));
    if constexpr (bits == 7) return below;
    const __m512i above = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), index, _mm512_loadu_si512(table + 192));
    return _mm512_mask_mov_epi8(below, _mm512_movepi8_mask(index), above);
  }
}

// Part p of a block of 16 rows.
template <int bits, int p>
KMQ_VNNI void decode_part(const uint8_t* const* block, const int8_t* const* table, int8_t* panel) {
  __m512 r[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    r[i] = _mm512_castsi512_ps(entries<bits>(table[i], IndexBytes<bits>(block[i]).template index<p>()));
  transpose16(r);
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) _mm512_store_ps(panel + l * 4 * kInt8RowsVnni, r[l]);
}

template <int bits>
KMQ_VNNI void decode_vnni(const LinearWeight& weight, int64_t row, int64_t rows, int8_t* panel) {
  const Packed& packed = weight.packed;
  const uint8_t* block[kInt8RowsVnni];
  const int8_t* table[kInt8RowsVnni];
  for (int64_t r = 0; r < kInt8RowsVnni; ++r) {
    const int64_t from = row + std::min(r, rows - 1);
    block[r] = packed.data + from * packed.row_bytes();
    table[r] = weight.table + ((from / weight.group_rows) << bits);
  }
  constexpr int64_t part = kLanes * 4 * kInt8RowsVnni;
  for (int64_t col = 0; col < packed.cols; col += kBlock, panel += 2 * part) {
    for (int half = 0; half < 2; ++half) {
      decode_part<bits, 0>(block + half * kLanes, table + half * kLanes, panel + half * 64);
      decode_part<bits, 1>(block + half * kLanes, table + half * kLanes, panel + half * 64 + part);
    }
    for (const uint8_t*& at : block) at += kLanes * bits;
  }
}

constexpr int kTileRowsVnni = 12;

// sums [R][32] of R input rows and a panel: 2 R sums, the panel's 2 registers and what is multiplied stay in registers. Few rows
// are summed in `chains` parts, or each product would wait for the one before.
template <int R>
KMQ_VNNI void tile_vnni(int64_t groups, const uint8_t* a, int64_t lda, const int8_t* panel, int32_t* sums) {
  constexpr int chains = R == 1 ? 4 : R <= 3 ? 2 : 1;
  __m512i sum[chains][R][2];
#pragma GCC unroll 4
  for (int s = 0; s < chains; ++s)
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) sum[s][i][0] = sum[s][i][1] = _mm512_setzero_si512();
#pragma GCC unroll 1
  for (int64_t g = 0; g < groups; g += chains)
#pragma GCC unroll 4
    for (int s = 0; s < chains; ++s, a += 4, panel += 128) {
      const __m512i right[2] = {_mm512_load_si512(panel), _mm512_load_si512(panel + 64)};
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        int32_t four;
        std::memcpy(&four, a + i * lda, 4);
        const __m512i left = _mm512_set1_epi32(four);
        sum[s][i][0] = _mm512_dpbusd_epi32(sum[s][i][0], left, right[0]);
        sum[s][i][1] = _mm512_dpbusd_epi32(sum[s][i][1], left, right[1]);
      }
    }
#pragma GCC unroll 12
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      __m512i total = sum[0][i][v];
#pragma GCC unroll 4
      for (int s = 1; s < chains; ++s) total = _mm512_add_epi32(total, sum[s][i][v]);
      _mm512_store_si512(sums + 32 * i + 16 * v, total);
    }
}

inline void tile_vnni(int64_t rows, int64_t groups, const uint8_t* a, int64_t lda, const int8_t* panel, int32_t* sums) {
  switch (rows) {
    case 1: return tile_vnni<1>(groups, a, lda, panel, sums);
    case 2: return tile_vnni<2>(groups, a, lda, panel, sums);
    case 3: return tile_vnni<3>(groups, a, lda, panel, sums);
    case 4: return tile_vnni<4>(groups, a, lda, panel, sums);
    case 5: return tile_vnni<5>(groups, a, lda, panel, sums);
    case 6: return tile_vnni<6>(groups, a, lda, panel, sums);
    case 7: return tile_vnni<7>(groups, a, lda, panel, sums);
    case 8: return tile_vnni<8>(groups, a, lda, panel, sums);
    case 9: return tile_vnni<9>(groups, a, lda, panel, sums);
    case 10: return tile_vnni<10>(groups, a, lda, panel, sums);
    case 11: return tile_vnni<11>(groups, a, lda, panel, sums);
    default: return tile_vnni<12>(groups, a, lda, panel, sums);
  }
}

// What belongs to the rows of a panel.
struct PanelRows {
  alignas(64) float factor[kInt8RowsVnni], bias[kInt8RowsVnni];
  alignas(64) int32_t row_sum[kInt8RowsVnni];
};

// Sums of the bytes of `rows` input rows become sums of their numbers, those the formula of int8.h, and that its activation: `count` columns
// of outputs ld apart. added [rows][32] or null.
template <Activation activation, typename T>
KMQ_VNNI void finish_vnni(const Int8Input& input, int64_t m, int64_t rows, int64_t count, const int8_t* panel, const PanelRows& of,
                          const float* added, const int32_t* sums, T* out, int64_t ld) {
  const __m512i row_sum[2] = {_mm512_load_si512(of.row_sum), _mm512_load_si512(of.row_sum + 16)};
  const __m512 factor[2] = {_mm512_load_ps(of.factor), _mm512_load_ps(of.factor + 16)};
  const __m512 bias[2] = {_mm512_load_ps(of.bias), _mm512_load_ps(of.bias + 16)};
  const __mmask16 lanes[2] = {first_lanes(count), first_lanes(std::max<int64_t>(0, count - 16))};
#pragma GCC unroll 1
  for (int64_t i = 0; i < rows; ++i, sums += 32, out += ld) {
    const Int8Row row = input.row[m + i];
    const __m512i least = _mm512_set1_epi32(row.least);
    __m512i total[2] = {_mm512_add_epi32(_mm512_mullo_epi32(least, row_sum[0]), _mm512_load_si512(sums)),
                        _mm512_add_epi32(_mm512_mullo_epi32(least, row_sum[1]), _mm512_load_si512(sums + 16))};
    if (row.above + row.below) {
      const Int8Added* at = input.list(m + i);
      __m512i below[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 1
      for (const Int8Added* const end = at + row.above; at != end; ++at) {
        const __m512i bytes = _mm512_set1_epi32(int32_t(at->bytes));
        total[0] = _mm512_dpbusd_epi32(total[0], bytes, _mm512_load_si512(panel + at->group * 128));
        total[1] = _mm512_dpbusd_epi32(total[1], bytes, _mm512_load_si512(panel + at->group * 128 + 64));
      }
#pragma GCC unroll 1
      for (const Int8Added* const end = at + row.below; at != end; ++at) {
        const __m512i bytes = _mm512_set1_epi32(int32_t(at->bytes));
        below[0] = _mm512_dpbusd_epi32(below[0], bytes, _mm512_load_si512(panel + at->group * 128));
        below[1] = _mm512_dpbusd_epi32(below[1], bytes, _mm512_load_si512(panel + at->group * 128 + 64));
      }
      total[0] = _mm512_sub_epi32(total[0], below[0]);
      total[1] = _mm512_sub_epi32(total[1], below[1]);
    }
    const __m512 scale = _mm512_set1_ps(row.scale);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total[v]), scale), factor[v]);
      if (added) y = _mm512_add_ps(y, _mm512_load_ps(added + 32 * i + 16 * v));
      y = (__m512)activated<16, activation>((Floats<16>)_mm512_add_ps(y, bias[v]));
      if (lanes[v]) store16(out + 16 * v, y, lanes[v]);
    }
  }
}

template <typename T>
void finish_vnni(Activation activation, const Int8Input& input, int64_t m, int64_t rows, int64_t count, const int8_t* panel, const PanelRows& of,
                 const float* added, const int32_t* sums, T* out, int64_t ld) {
  switch (activation) {
    case Activation::none: return finish_vnni<Activation::none>(input, m, rows, count, panel, of, added, sums, out, ld);
    case Activation::gelu: return finish_vnni<Activation::gelu>(input, m, rows, count, panel, of, added, sums, out, ld);
    case Activation::gelu_tanh: return finish_vnni<Activation::gelu_tanh>(input, m, rows, count, panel, of, added, sums, out, ld);
    case Activation::relu: return finish_vnni<Activation::relu>(input, m, rows, count, panel, of, added, sums, out, ld);
    case Activation::silu: return finish_vnni<Activation::silu>(input, m, rows, count, panel, of, added, sums, out, ld);
  }
}

}  // namespace kmq::cpu
#endif
