// Writing packed indices: the inverse of decode.h, layout of kmq_kernels/packing.py.
#pragma once
#include "../codes/decode.h"

namespace kmq::cpu {

template <int width>
inline void encode_plane(const uint8_t* index, int shift, uint8_t* plane) {
  constexpr int per_byte = 8 / width, mask = (1 << width) - 1;
  for (int byte = 0; byte < width; ++byte) {
    uint8_t lanes[kLanes] = {};
    for (int field = 0; field < per_byte; ++field) {
      const uint8_t* columns = index + (byte * per_byte + field) * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] |= ((columns[lane] >> shift) & mask) << (field * width);
    }
    for (int lane = 0; lane < kLanes; ++lane) plane[lane * width + byte] = lanes[lane];
  }
}

// One block from its 128 indices, in column order.
inline void encode_block(const uint8_t* index, int bits, uint8_t* block) {
  int shift = 0;
  for (const int* width = planes(bits); *width; ++width) {
    if (*width == 4) encode_plane<4>(index, shift, block);
    else if (*width == 2) encode_plane<2>(index, shift, block);
    else encode_plane<1>(index, shift, block);
    block += kLanes * *width;
    shift += *width;
  }
}

}  // namespace kmq::cpu
