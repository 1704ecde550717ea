#include <vector>

#include "cluster_sums.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kTask = 32768;  // values of one partial sum

template <typename T>
void run(const void* grad_output, const int64_t* ids, int64_t count, const Packed& packed, int64_t num_codebooks,
         int64_t group_rows, int64_t padding_idx, void* out, const Parallel& parallel) {
  using Wide = std::conditional_t<sizeof(T) == 8, double, float>;
  const T* grad = static_cast<const T*>(grad_output);
  const int64_t K = int64_t(1) << packed.bits;
  std::vector<int64_t> order;  // positions in ids, those of one codebook together and in their order
  order.reserve(count);
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] != padding_idx) order.push_back(i);
  const auto group = [&](int64_t at) { return ids[order[at]] / group_rows; };
  if (num_codebooks > 1)
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[a] / group_rows < ids[b] / group_rows; });

  // Tasks end at a change of codebook or after kTask values.
  const int64_t piece = 1 + kTask / (packed.cols + 1), positions = static_cast<int64_t>(order.size());
  std::vector<int64_t> starts;
  for (int64_t at = 0; at < positions; ++at)
    if (at == 0 || group(at) != group(at - 1) || at - starts.back() == piece) starts.push_back(at);
  const int64_t tasks = static_cast<int64_t>(starts.size());
  starts.push_back(positions);
  std::vector<double> partial(tasks * K, 0.0);
  parallel(tasks, 1 + tasks * kTask / (positions * packed.cols + 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      ClusterSums sums(packed.bits, partial.data() + task * K, (starts[task + 1] - starts[task]) * packed.cols);
      for (int64_t at = starts[task]; at < starts[task + 1]; ++at)
        sums.add(grad + order[at] * packed.cols, packed.data + ids[order[at]] * packed.row_bytes(), packed.cols);
      sums.finish();
    }
  });
  std::vector<double> total(num_codebooks * K, 0.0);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t k = 0; k < K; ++k) total[group(starts[task]) * K + k] += partial[task * K + k];
  for (int64_t i = 0; i < num_codebooks * K; ++i) static_cast<Wide*>(out)[i] = static_cast<Wide>(total[i]);
}

}  // namespace

void codebook_embedding_grad(const void* grad_output, Dtype dtype, const int64_t* ids, int64_t count, const Packed& packed,
                             int64_t num_codebooks, int64_t group_rows, int64_t padding_idx, void* out,
                             const Parallel& parallel) {
  const auto kernel = dtype == Dtype::f32 ? &run<float> : dtype == Dtype::f64 ? &run<double> : dtype == Dtype::bf16 ? &run<bf16> : &run<f16>;
  kernel(grad_output, ids, count, packed, num_codebooks, group_rows, padding_idx, out, parallel);
}

}  // namespace kmq::cpu
