// Panels of the weight for the tiles of linear/gemm.h: 16 rows are turned, so that a decoded register belongs to one column.
#pragma once
#include "decode_avx2.h"
#include "decode_avx512.h"

#ifdef KMQ_X86
namespace kmq::cpu {

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

}  // namespace kmq::cpu
#endif
