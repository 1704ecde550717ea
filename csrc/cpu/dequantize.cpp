#include "decode.h"

namespace kmq::cpu {
namespace {

template <typename T>
void rows(const Packed& packed, const T* codebook, int64_t group_rows, T* weight, int64_t begin, int64_t end) {
  uint8_t index[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* block = packed.data + row * packed.row_bytes();
    const T* book = codebook + ((row / group_rows) << packed.bits);
    T* out = weight + row * packed.cols;
    for (int64_t col = 0; col < packed.cols; col += kBlock, block += kLanes * packed.bits) {
      decode_block(block, packed.bits, index);
      const int64_t count = packed.cols - col < kBlock ? packed.cols - col : kBlock;
      for (int64_t i = 0; i < count; ++i) out[col + i] = book[index[i]];
    }
  }
}

}  // namespace

void dequantize(const Packed& packed, const void* codebook, Dtype dtype, int64_t group_rows, void* weight, const Parallel& parallel) {
  const int64_t grain = 1 + 32768 / (packed.cols + 1);
  parallel(packed.rows, grain, [&](int64_t begin, int64_t end) {
    const auto run = [&](auto type) {
      using T = decltype(type);
      rows(packed, static_cast<const T*>(codebook), group_rows, static_cast<T*>(weight), begin, end);
    };
    if (dtype == Dtype::f64) run(double{});
    else if (dtype == Dtype::f32) run(float{});
    else run(uint16_t{});  // bf16 and fp16 are copied as they are
  });
}

}  // namespace kmq::cpu
