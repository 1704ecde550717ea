// The pieces of the clustering engine, shared by the kmeans_*.cpp files.
#pragma once
#include <vector>

#include "../kmq.h"

namespace kmq::cpu {

// What a problem is solved on: ascending positions with positive weights. A point is one value of the data, or the mean of
// several; then `spread` holds, for each point, an upper bound of the weighted squared error of its values around it, and
// `blur` is how far a value may lie from where the histogram saw it (rounding of its key).
struct Points {
  std::vector<double> x, w, spread;
  double blur = 0;
};

struct Solution {
  std::vector<double> centroids;   // ascending, num_centroids of them; padded with the largest
  std::vector<int64_t> edges;      // points [edges[k], edges[k + 1]) made centroid k; empty where the points did not suffice
  int64_t n_iter = 0;
  double lower_bound = 0;          // of the optimum; negative where none is known
};

Solution solve(const Points& points, int num_centroids, const KmeansOptions& options);

// Points from the sorted values: exact, costs a sort.
KmeansFault sorted_points(const void* values, Dtype dtype, const float* weight, int64_t n, Points& points);

// Points from a histogram of the values: one pass, a fixed amount of memory. Segments of kSegment values can be counted on
// different threads; their sums are added in the order of the segments.
class Histogram {
 public:
  static constexpr int64_t kSegment = int64_t(1) << 21;
  Histogram(const void* values, Dtype dtype, const float* weight, int64_t n);
  int64_t segments() const { return static_cast<int64_t>(parts_.size()); }
  void count(int64_t segment);
  // Falls back to sorted_points where a histogram cannot resolve the values.
  KmeansFault points(Points& points);

 private:
  struct Bin { double weight, sum; };
  struct Part {
    std::vector<uint64_t> counts;
    std::vector<Bin> bins;
    std::vector<int64_t> outside;  // positions of values beyond the last bin
    KmeansFault fault = KmeansFault::none;
  };
  template <typename T> void count_half(Part& part, const T* values, int64_t begin, int64_t end);
  void count_float(Part& part, int64_t begin, int64_t end);
  bool few_distinct(Points& points) const;

  const void* values_;
  Dtype dtype_;
  const float* weight_;
  int64_t n_;
  float origin_ = 0, scale_ = 0;
  std::vector<Part> parts_;
};

// The binary search for the nearest centroid, level by level: bit l of the index, from the top, is value > pivot[l][bits above].
struct Labeller {
  Labeller(const float* midpoints, const float* centroids, int num_centroids);
  int levels;
  float pivot[8][128];
  float centroid[256];
  // Indices of n values; adds the weighted squared errors to error[8], value i to lane i % 8.
  void run(const void* values, Dtype dtype, const float* weight, int64_t n, uint8_t* index, double* error) const;
};

}  // namespace kmq::cpu
