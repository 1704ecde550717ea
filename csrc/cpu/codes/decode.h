// Reading packed indices, shared by the CPU kernels: the layout of kmq_kernels/packing.py.
//
// decode_block (layout.h) gives the indices of one block; decode_rows gives weights. The vector forms of the latter, Decoder<bits>
// and Decoder512<bits>, hand registers of 8 or 16 neighbouring columns to a consumer, so that a kernel may use them without storing
// them.
#pragma once
#include "decode_panel.h"
#include "layout.h"

namespace kmq::cpu {

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
