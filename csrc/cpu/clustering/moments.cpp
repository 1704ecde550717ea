#include "moments.h"

#include <algorithm>
#include <bit>

#include "kmeans.h"

namespace kmq::cpu {

void Moments::set(const Points& points) {
  const int64_t n = points.size(), leaves = (n + kLeaf - 1) / kLeaf;
  x_ = points.x.data();
  w_ = points.w.empty() ? nullptr : points.w.data();
  up_to_.resize(n);
  from_.resize(n);
  std::vector<Moment> left(leaves), right(leaves);  // the leaves of a run up to this one, and from this one on
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    const int64_t begin = leaf * kLeaf, end = std::min(begin + kLeaf, n);
    for (int64_t i = begin; i < end; ++i) up_to_[i] = i == begin ? point(i) : join(up_to_[i - 1], point(i));
    for (int64_t i = end; i-- > begin;) from_[i] = i + 1 == end ? point(i) : join(point(i), from_[i + 1]);
    left[leaf] = right[leaf] = up_to_[end - 1];
  }
  runs_.resize(std::bit_width(static_cast<uint64_t>(leaves - 1)));
  for (size_t bit = 0; bit < runs_.size(); ++bit) {
    const int64_t size = int64_t(1) << bit;
    runs_[bit].resize(leaves);
    for (int64_t leaf = 0; leaf < leaves; ++leaf) {
      const int64_t border = (leaf & ~(size - 1)) + (leaf & size ? 0 : size);  // where the other half of a run of 2 * size begins or ends
      if (leaf & size) {
        runs_[bit][leaf] = left[leaf];
        left[leaf] = join(left[border - 1], left[leaf]);
      } else {
        runs_[bit][leaf] = right[leaf];
        if (border < leaves) right[leaf] = join(right[leaf], right[border]);
      }
    }
  }
}

Moment Moments::leaves(int64_t first, int64_t last) const {
  if (first == last) return from_[first * kLeaf];
  const std::vector<Moment>& run = runs_[std::bit_width(static_cast<uint64_t>(first ^ last)) - 1];
  return join(run[first], run[last]);
}

Moment Moments::of(int64_t i, int64_t j) const {
  const int64_t last = j - 1, first_leaf = i / kLeaf, last_leaf = last / kLeaf;
  if (first_leaf < last_leaf) {
    const Moment from = last_leaf == first_leaf + 1 ? from_[i] : join(from_[i], leaves(first_leaf + 1, last_leaf - 1));
    return join(from, up_to_[last]);
  }
  if (i % kLeaf == 0) return up_to_[last];
  if (last % kLeaf == kLeaf - 1) return from_[i];
  Moment out = point(i);
  for (int64_t next = i + 1; next <= last; ++next) out = join(out, point(next));
  return out;
}

}  // namespace kmq::cpu
