// The pieces of the clustering engine, shared by the kmeans_*.cpp files.
#pragma once
#include <algorithm>
#include <vector>

#include "../../kmq.h"
#include "../half.h"
#include "moments.h"

namespace kmq::cpu {

constexpr int64_t kSmall = 16384;  // values; up to here, a problem is sorted and solved exactly

// What a problem is solved on: ascending positions with positive weights; `w` is empty where all weights are one, and then
// positions may repeat. A point is one value of the data, or the mean of several; then `spread` holds, for each point, an upper
// bound of the weighted squared error of its values around it, and `blur` is how far a value may lie from where the histogram
// saw it (rounding of its key).
struct Points {
  // The values that a point is the mean of, and what they lie between: those of a bin, or gathered ones. Neither where it is one.
  struct Members { int64_t first = 0, last = 0; int32_t bin = -1; float low = 0, high = 0; };
  std::vector<double> x, w, spread;
  std::vector<Members> members;  // like spread
  double blur = 0;
  int64_t size() const { return static_cast<int64_t>(x.size()); }
  bool single(int64_t i) const { return members[i].bin < 0 && members[i].first == members[i].last; }
  void ascend();  // makes positions that rounding set equal ascend
  void clear();
};

// Intervals of points: [edges[k], edges[k + 1]) is the k-th.
using Edges = std::vector<int64_t>;

// Prefix sums of weight, weight * (x - origin) and weight * (x - origin)^2, entry i over the points before i. They are counted
// from the weighted median outwards: values far out leave the differences near the bulk exact. Where that is not enough, the
// squared errors come from `moments`, and wxx is zero.
struct Sums {
  static constexpr int64_t kPad = 16;  // entries that vector loads may touch beyond the last
  std::vector<double> w, wx, wxx;
  double origin = 0;
  double rounding = 0;  // by how much the cost of a partition may be off, about
  int64_t n = 0;
  const double* reciprocal = nullptr;  // of small numbers, where all weights are one
  const Moments* moments = nullptr;
  const int64_t* cells = nullptr;  // of which these are the sums, for `moments`

  void set(const Points& points);
  void pick(const Sums& all, const Edges& cells);  // those at the edges of cells, which must stay
  void use(const Moments& exact);                  // of the same points
  bool resolve(double cost) const;                 // the cost of a partition
  double weight(int64_t i, int64_t j) const { return w[j] - w[i]; }
  Moment moment(int64_t i, int64_t j) const { return cells ? moments->of(cells[i], cells[j]) : moments->of(i, j); }
  // Squared error of the points [i, j) around their mean.
  double cost(int64_t i, int64_t j) const {
    if (moments) return moment(i, j).error;
    const double first = wx[j] - wx[i];
    const double cost = (wxx[j] - wxx[i]) - first * first / (w[j] - w[i]);
    return cost > 0 ? cost : 0;
  }

 private:
  void pad();
};

// Working memory of best_partition and best_nearby, kept from problem to problem.
struct PartitionScratch {
  struct Block { int64_t end, last; };
  std::vector<double> gain[2];
  std::vector<Block> blocks;
  Edges tried, low, high;
};

// The best partition into `count` intervals, fewer than points. `price` is a guess of what one interval more would save, and
// `slope` of that saving times the number of intervals over their cost (2 for many points). Returns a price for which nearly this
// number of intervals is the best, and their cost.
struct BestPrice { double price, cost; };
BestPrice best_partition(const Sums& sums, int64_t count, double price, double slope, PartitionScratch& scratch, Edges& edges);

// Among the partitions whose k-th edge lies in [low[k], high[k]], ranges that ascend without overlap, the best one.
void best_nearby(const Sums& sums, const Edges& low, const Edges& high, PartitionScratch& scratch, Edges& edges);

struct Solution {
  std::vector<double> centroids;   // ascending, num_centroids of them; padded with the largest
  Edges edges;                     // points that made each centroid; empty where the points did not suffice
  int64_t n_iter = 0;
  double lower_bound = 0;          // of the optimum; negative where none is known
  double cost = 0;                 // of the best partition of the points
};

// What similar problems tell the next one: the ratio of prices found to prices guessed, and the slope of best_partition.
struct Known { double price_ratio = 1, slope = 2; };

// Working memory of one thread, kept from problem to problem.
struct Scratch {
  std::vector<uint64_t> items, others;
  std::vector<float> wide;
  Points points, finer;
  Sums sums, cell_sums;
  Moments moments;
  PartitionScratch partition;
  Solution solution;
  Known known;
};

void solve(const Points& points, int num_centroids, const KmeansOptions& options, Scratch& scratch, Solution& solution);

// Moves each inner edge of a solution to the best place in [low, high], where `edges` lies too; then Lloyd iterations.
void settle(const Points& points, const Edges& edges, const Edges& low, const Edges& high, const KmeansOptions& options, Scratch& scratch,
            Solution& solution);

// Values taken out of marked bins, in the order of the bins.
struct Gathered { std::vector<float> x, w; };  // w is empty where all weights are one

// Takes the points that hold an edge of a solution apart and settles it, until none holds one: then the partition is the best one
// near by and stands still under Lloyd iterations over all values. Returns the points whose bins must be gathered first; none
// when it is done.
Edges zoom(Points& points, Gathered& values, const KmeansOptions& options, Scratch& scratch, Solution& solution);

constexpr float kLargest = 3.4028234e38f;

// What a value may lie between, as floats: of values near the largest, the margin around them is cut off.
inline float finite(double x) { return static_cast<float>(std::clamp<double>(x, -kLargest, kLargest)); }

// Unsigned keys in the order of the floats; both zeros get one key, and no finite value has key 0.
inline uint32_t sort_key(float x) {
  const uint32_t u = bits_of(x + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
inline float value_of(uint32_t key) { return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

KmeansFault weight_fault(float weight);

// Appends a point, or adds to the weight of the last one where it is in the same place.
void add_point(Points& points, double x, double w);

// Points from the sorted values: exact, costs a sort.
KmeansFault sorted_points(const void* values, Dtype dtype, const float* weight, int64_t n, Scratch& scratch, Points& points);

// Points from a histogram of the values: one pass, a fixed amount of memory. Segments of kSegment values can be counted on
// different threads; their sums are added in the order of the segments.
class Histogram {
 public:
  static constexpr int64_t kSegment = int64_t(1) << 21;
  Histogram(const void* values, Dtype dtype, const float* weight, int64_t n, int num_centroids);
  int64_t segments() const { return static_cast<int64_t>(parts_.size()); }
  void count(int64_t segment);
  // Falls back to sorted_points where a histogram cannot resolve the values. Forgets the counts.
  KmeansFault points(Scratch& scratch, Points& points);

  // A second pass, for the values of some bins: mark them, gather each segment, take what was found. Values of weight zero are
  // left out. The i-th bin's values lie between the i-th and the next of the positions returned.
  void mark(const std::vector<int32_t>& bins);
  void gather(int64_t segment);
  std::vector<int64_t> take(Gathered& values);

  struct Keys {
    float origin = 0, scale = 0;
    int low_bits = 0;
    uint32_t half_bins = 0, first = 0;  // bins of one sign, before the one for what lies outside; key of scale itself
  };
  struct Marks {
    std::vector<uint16_t> of;  // of each bin: its number from 1 on, 0 where it is not marked
    int32_t count = 0;
    uint32_t bits[32] = {};    // a filter that a register or four hold
  };

 private:
  struct Bin { double weight, sum; };
  struct Found { float x; uint16_t mark; };
  struct Part {
    std::vector<uint64_t> counts;
    std::vector<Bin> bins;
    std::vector<int64_t> outside;  // positions of values beyond the last bin
    std::vector<Found> found;
    std::vector<float> found_weight;
    KmeansFault fault = KmeansFault::none;
  };
  template <typename T> void count_half(Part& part, const T* values, int64_t begin, int64_t end);
  void count_float(Part& part, int64_t begin, int64_t end);
  bool few_distinct(Points& points) const;
  int64_t num_bins() const { return 2 * (int64_t(keys_.half_bins) + 1); }

  const void* values_;
  Dtype dtype_;
  const float* weight_;
  int64_t n_;
  Keys keys_;
  std::vector<Part> parts_;
  Marks marks_;
};

// The binary search for the nearest centroid, level by level: bit l of the index, from the top, is value > pivot[l][bits above].
struct Labeller {
  Labeller(const float* midpoints, const float* centroids, int num_centroids);
  int levels;
  float pivot[8][128];
  float centroid[256];
  // Indices of n values: bytes, or blocks of packed indices where bits are given (then there are 2^bits centroids). Adds the
  // weighted squared errors to error[8], value i to lane i % 8.
  void run(const void* values, Dtype dtype, const float* weight, int64_t n, int bits, uint8_t* out, double* error) const;
};

}  // namespace kmq::cpu
