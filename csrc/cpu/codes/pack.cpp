#include "decode.h"

namespace kmq::cpu {
namespace {

// The inverse of decode_block.
void encode_block(const uint8_t* index, int bits, uint8_t* block) {
  int shift = 0;
  for (const int* width = planes(bits); *width; ++width) {
    const int per_byte = 8 / *width, mask = (1 << *width) - 1;
    for (int byte = 0; byte < *width; ++byte) {
      uint8_t lanes[kLanes] = {};
      for (int field = 0; field < per_byte; ++field)
        for (int lane = 0; lane < kLanes; ++lane)
          lanes[lane] |= ((index[(byte * per_byte + field) * kLanes + lane] >> shift) & mask) << (field * *width);
      for (int lane = 0; lane < kLanes; ++lane) block[lane * *width + byte] = lanes[lane];
    }
    block += kLanes * *width;
    shift += *width;
  }
}

#ifdef KMQ_X86
template <int bits>
KMQ_AVX2 void unpack_row_avx2(const uint8_t* block, int64_t cols, uint8_t* assignments) {
  for (; cols >= kBlock; cols -= kBlock, assignments += kBlock, block += kLanes * bits) indices_avx2<bits>(block, assignments);
  if (cols > 0) {
    uint8_t index[kBlock];
    indices_avx2<bits>(block, index);
    std::memcpy(assignments, index, cols);
  }
}
#endif

void unpack_row(const uint8_t* block, int bits, int64_t cols, uint8_t* assignments) {
#ifdef KMQ_X86
  if (avx2()) return with_small(bits, [&](auto constant) { unpack_row_avx2<constant()>(block, cols, assignments); });
#endif
  uint8_t index[kBlock];
  for (; cols > 0; cols -= kBlock, assignments += kBlock, block += kLanes * bits) {
    decode_block(block, bits, index);
    std::memcpy(assignments, index, std::min(cols, kBlock));
  }
}

}  // namespace

void pack(const uint8_t* assignments, int64_t rows, int64_t cols, int bits, uint8_t* packed, const Parallel& parallel) {
  const int64_t row_bytes = Packed{packed, rows, cols, bits}.row_bytes();
  parallel(rows, 1 + 65536 / (cols + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* from = assignments + row * cols;
      uint8_t* block = packed + row * row_bytes;
      int64_t col = 0;
      for (; col + kBlock <= cols; col += kBlock, block += kLanes * bits) encode_block(from + col, bits, block);
      if (col < cols) {
        uint8_t index[kBlock] = {};
        std::memcpy(index, from + col, cols - col);
        encode_block(index, bits, block);
      }
    }
  });
}

void unpack(const Packed& packed, uint8_t* assignments, const Parallel& parallel) {
  parallel(packed.rows, 1 + 65536 / (packed.cols + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      unpack_row(packed.data + row * packed.row_bytes(), packed.bits, packed.cols, assignments + row * packed.cols);
  });
}

}  // namespace kmq::cpu
