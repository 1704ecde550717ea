#include <vector>

#include "cluster_sums.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kTask = 32768;  // values of one partial sum

template <typename T>
void run(const T* grad, const Packed& packed, int64_t num_codebooks, int64_t group_rows, void* out, const Parallel& parallel) {
  const Pieces pieces(packed.rows, group_rows, std::max<int64_t>(kTask / std::max<int64_t>(packed.cols, 1), 1));
  const int64_t K = int64_t(1) << packed.bits;
  std::vector<double> partial(pieces.count * K, 0.0);
  const int64_t grain = 1 + kTask / (std::min(pieces.piece, pieces.group_rows) * packed.cols + 1);
  parallel(pieces.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = pieces.begin(task), last = pieces.end(task);
      ClusterSums sums(packed.bits, partial.data() + task * K, (last - first) * packed.cols);
      // Rows of whole blocks follow each other without a gap.
      const int64_t step = packed.cols % kBlock == 0 ? std::max<int64_t>(last - first, 1) : 1;
      for (int64_t row = first; row < last; row += step)
        sums.add(grad + row * packed.cols, packed.data + row * packed.row_bytes(), step * packed.cols);
      sums.finish();
    }
  });
  for (int64_t group = 0; group < num_codebooks; ++group)
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0.0;
      for (int64_t piece = 0; piece < pieces.per_group; ++piece) sum += partial[(group * pieces.per_group + piece) * K + k];
      if constexpr (sizeof(T) == 8) static_cast<double*>(out)[group * K + k] = sum;
      else static_cast<float*>(out)[group * K + k] = static_cast<float>(sum);
    }
}

}  // namespace

void codebook_grad(const void* grad, Dtype dtype, const Packed& packed, int64_t num_codebooks, int64_t group_rows, void* out,
                   const Parallel& parallel) {
  switch (dtype) {
    case Dtype::f32: run(static_cast<const float*>(grad), packed, num_codebooks, group_rows, out, parallel); break;
    case Dtype::f64: run(static_cast<const double*>(grad), packed, num_codebooks, group_rows, out, parallel); break;
    case Dtype::bf16: run(static_cast<const bf16*>(grad), packed, num_codebooks, group_rows, out, parallel); break;
    case Dtype::f16: run(static_cast<const f16*>(grad), packed, num_codebooks, group_rows, out, parallel); break;
  }
}

}  // namespace kmq::cpu
