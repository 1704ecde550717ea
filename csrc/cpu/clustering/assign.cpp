#include <algorithm>
#include <numeric>

#include "kmeans.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kChunk = 16384;

void nearest(const double* values, const std::vector<double>& midpoints, int64_t n, uint8_t* index) {
  for (int64_t i = 0; i < n; ++i)
    index[i] = static_cast<uint8_t>(std::lower_bound(midpoints.begin(), midpoints.end(), values[i]) - midpoints.begin());
}

template <typename T>
std::vector<T> midpoints_of(const void* centroids, int64_t problem, int num_centroids) {
  const T* c = static_cast<const T*>(centroids) + problem * num_centroids;
  std::vector<T> out;
  for (int k = 0; k + 1 < num_centroids; ++k) out.push_back(std::midpoint(c[k], c[k + 1]));
  return out;
}

}  // namespace

void assign(const void* values, Dtype dtype, const void* centroids, int64_t batch, int64_t n, int num_centroids, uint8_t* assignments,
            const Parallel& parallel) {
  const int64_t chunks = (n + kChunk - 1) / kChunk, item = dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
  parallel(batch * chunks, 1 + kChunk / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t problem = task / chunks, first = task % chunks * kChunk;
      const int64_t next = std::min(end, (problem + 1) * chunks), last = std::min(n, (next - problem * chunks) * kChunk);
      const char* from = static_cast<const char*>(values) + (problem * n + first) * item;
      uint8_t* index = assignments + problem * n + first;
      if (dtype == Dtype::f64) {
        nearest(reinterpret_cast<const double*>(from), midpoints_of<double>(centroids, problem, num_centroids), last - first, index);
      } else {
        const std::vector<float> midpoints = midpoints_of<float>(centroids, problem, num_centroids);
        double error[8] = {};
        Labeller(midpoints.data(), static_cast<const float*>(centroids) + problem * num_centroids, num_centroids)
            .run(from, dtype, nullptr, last - first, 0, index, error);
      }
      task = next;
    }
  });
}

}  // namespace kmq::cpu
