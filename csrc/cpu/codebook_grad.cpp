#include <vector>

#include "decode.h"
#include "half.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kChunkRows = 64;  // rows of one partial sum: fixed, so that the order of additions is

// sums [touched codebooks, K] += grad over rows [begin, end), which lie in codebooks from `first` on.
template <typename T>
void add_rows(const T* grad, const Packed& packed, int64_t group_rows, int64_t begin, int64_t end, int64_t first, double* sums) {
  uint8_t index[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* block = packed.data + row * packed.row_bytes();
    double* book = sums + ((row / group_rows - first) << packed.bits);
    for (int64_t col = 0; col < packed.cols; col += kBlock, block += kLanes * packed.bits) {
      decode_block(block, packed.bits, index);
      const T* values = grad + row * packed.cols + col;
      const int64_t count = packed.cols - col < kBlock ? packed.cols - col : kBlock;
      for (int64_t i = 0; i < count; ++i) {
        if constexpr (sizeof(T) == 2) book[index[i]] += static_cast<float>(values[i]);
        else book[index[i]] += values[i];
      }
    }
  }
}

}  // namespace

void codebook_grad(const void* grad, Dtype dtype, const Packed& packed, int64_t num_codebooks, int64_t group_rows, void* out,
                   const Parallel& parallel) {
  const int64_t chunks = (packed.rows + kChunkRows - 1) / kChunkRows;
  const int64_t K = int64_t(1) << packed.bits;
  std::vector<std::vector<double>> partial(chunks);
  parallel(chunks, 1, [&](int64_t begin_chunk, int64_t end_chunk) {
    for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
      const int64_t begin = chunk * kChunkRows, end = begin + kChunkRows < packed.rows ? begin + kChunkRows : packed.rows;
      const int64_t first = begin / group_rows, books = (end - 1) / group_rows - first + 1;
      partial[chunk].assign(books * K, 0.0);
      const auto run = [&](auto type) {
        add_rows(static_cast<const decltype(type)*>(grad), packed, group_rows, begin, end, first, partial[chunk].data());
      };
      switch (dtype) {
        case Dtype::f32: run(float{}); break;
        case Dtype::f64: run(double{}); break;
        case Dtype::bf16: run(bf16{}); break;
        case Dtype::f16: run(f16{}); break;
      }
    }
  });
  std::vector<double> total(num_codebooks * K, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    double* sums = total.data() + chunk * kChunkRows / group_rows * K;
    for (size_t i = 0; i < partial[chunk].size(); ++i) sums[i] += partial[chunk][i];
  }
  for (int64_t i = 0; i < num_codebooks * K; ++i) {
    if (dtype == Dtype::f64) static_cast<double*>(out)[i] = total[i];
    else static_cast<float*>(out)[i] = static_cast<float>(total[i]);
  }
}

}  // namespace kmq::cpu
