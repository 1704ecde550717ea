// The layout of packed indices, see kmq_kernels/packing.py, one index at a time; what the files of decode.h share.
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

}  // namespace kmq::cpu
