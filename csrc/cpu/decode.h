// Reading packed indices, shared by the CPU kernels: the layout of kmq_kernels/packing.py.
#pragma once
#include <cstring>

#include "../kmq.h"

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
    for (int lane = 0; lane < kLanes; ++lane)
      for (int byte = 0; byte < *width; ++byte)
        for (int field = 0; field < per_byte; ++field) {
          const int column = (byte * per_byte + field) * kLanes + lane;
          index[column] |= ((block[lane * *width + byte] >> (field * *width)) & mask) << shift;
        }
    block += kLanes * *width;
    shift += *width;
  }
}

}  // namespace kmq::cpu
