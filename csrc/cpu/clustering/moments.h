// Squared errors of intervals of points without cancellation, for points whose prefix sums (see Sums) lose them: weights of many
// decades, values far apart for the width of their clusters.
//
// The weight, mean and squared error of two neighbouring sets give those of both by additions of numbers that are not negative
// (Chan, Golub and LeVeque 1979). The points are cut into leaves of kLeaf; every place knows its leaf up to it and from it on, and
// the leaves between those of an interval's ends are two runs that were joined before: for each bit in which two numbers of leaves
// can first differ, every leaf knows the run from it to the border between them. Seven numbers a point, four joins an interval.
#pragma once
#include <cstdint>
#include <vector>

namespace kmq::cpu {

struct Points;

struct Moment { double weight, mean, error; };

inline Moment join(const Moment& a, const Moment& b) {
  const bool more = b.weight > a.weight;  // the mean is counted from that of the heavier one
  const Moment &near = more ? b : a, &far = more ? a : b;
  const double weight = a.weight + b.weight, share = far.weight / weight, step = far.mean - near.mean;
  return {weight, near.mean + step * share, a.error + b.error + step * step * (near.weight * share)};
}

class Moments {
 public:
  void set(const Points& points);  // which must stay while these are asked
  Moment of(int64_t i, int64_t j) const;  // of the points [i, j), at least one

 private:
  static constexpr int64_t kLeaf = 16;
  Moment point(int64_t i) const { return {w_ ? w_[i] : 1.0, x_[i], 0}; }
  Moment leaves(int64_t first, int64_t last) const;

  const double *x_ = nullptr, *w_ = nullptr;
  std::vector<Moment> up_to_, from_;       // of a leaf: its points up to this one, and from this one on
  std::vector<std::vector<Moment>> runs_;  // [bit][leaf]
};

}  // namespace kmq::cpu
