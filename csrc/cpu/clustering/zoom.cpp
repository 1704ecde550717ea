// From the best partition of a histogram's bins to the best one of the values themselves.
//
// An edge between clusters is the middle of two centroids. Only the points that hold an edge between their least and their largest
// value matter: all others lie on one side of it as a whole. They are taken apart into narrower ones, down to single values, and
// the edges move among them.
#include <algorithm>
#include <cmath>

#include "kmeans.h"

namespace kmq::cpu {
namespace {

constexpr double kNear = 0.25;   // of the width of a bin
constexpr int64_t kReach = 16;   // how many points an edge may move at a time, before those that hold one are taken apart
constexpr int kParts = 8;  // of a bin whose values are not yet known
constexpr int64_t kBuckets = 64, kFew = 24;  // of few values, each becomes a point

void add(Points& points, double x, double w, double spread, Points::Members members) {
  points.x.push_back(x);
  points.w.push_back(w);
  points.spread.push_back(spread);
  points.members.push_back(members);
}

// Adds the points that some of the gathered values make, and brings these values into the order of the points.
void take_apart(Gathered& values, int64_t first, int64_t last, Points& points) {
  struct Value { float x, w; };
  std::vector<Value> all;
  all.reserve(last - first);
  for (int64_t i = first; i < last; ++i) all.push_back({values.x[i], values.w.empty() ? 1.0f : values.w[i]});
  if (all.size() <= kFew) {
    std::stable_sort(all.begin(), all.end(), [](const Value& a, const Value& b) { return a.x < b.x; });
    for (size_t i = 0; i < all.size(); ++i) {
      if (i > 0 && all[i].x == all[i - 1].x) points.w.back() += all[i].w;
      else add(points, all[i].x, all[i].w, 0, {});
    }
    return;
  }
  const auto [least, most] = std::minmax_element(all.begin(), all.end(), [](const Value& a, const Value& b) { return a.x < b.x; });
  const double low = least->x, width = double(most->x) - low;
  struct Bucket { int64_t count; double w, wx; };
  Bucket buckets[kBuckets] = {};
  const int64_t used = std::min(static_cast<int64_t>(std::sqrt(double(all.size()))), kBuckets);
  const double steps = width > 0 ? double(used) / width : 0, share = width / double(used);
  const auto bucket_of = [&](float x) { return std::min(static_cast<int64_t>((x - low) * steps), used - 1); };
  for (const Value& value : all) {
    Bucket& bucket = buckets[bucket_of(value.x)];
    ++bucket.count;
    bucket.w += value.w;
    bucket.wx += value.w * (value.x - low);
  }
  int64_t at[kBuckets], next = first;
  for (int64_t b = 0; b < used; ++b) {
    const Bucket& bucket = buckets[b];
    at[b] = next;
    next += bucket.count;
    if (bucket.count == 0) continue;
    const float from = finite(low + share * (double(b) - 0.01)), to = finite(low + share * (double(b) + 1.01));
    if (width > 0) add(points, low + bucket.wx / bucket.w, bucket.w, bucket.w * share * share, {at[b], next, -1, from, to});
    else add(points, low, bucket.w, 0, {});
  }
  for (const Value& value : all) {
    const int64_t i = at[bucket_of(value.x)]++;
    values.x[i] = value.x;
    if (!values.w.empty()) values.w[i] = value.w;
  }
}

double middle(const Solution& solution, int64_t k) { return (solution.centroids[k - 1] + solution.centroids[k]) / 2; }

bool holds(const Points& points, int64_t i, double x) {
  return !points.single(i) && points.members[i].low <= x && x <= points.members[i].high;
}

// Makes scratch.finer a copy of the points in which some are replaced, and settles a solution on it. `apart` ascends; replace(i,
// finer) adds the parts of i.
template <typename Replace>
void refine(const Points& points, const Edges& apart, const KmeansOptions& options, Scratch& scratch, Solution& solution,
              const Replace& replace) {
  const int64_t K = static_cast<int64_t>(solution.edges.size()) - 1;
  Points& finer = scratch.finer;
  finer.clear();
  finer.blur = points.blur;
  const auto copy = [](const auto& from, int64_t begin, int64_t end, auto& to) { to.insert(to.end(), from.begin() + begin, from.begin() + end); };
  Edges begins;  // of the parts
  int64_t done = 0;
  const auto copy_up_to = [&](int64_t end) {
    copy(points.x, done, end, finer.x);
    copy(points.w, done, end, finer.w);
    copy(points.spread, done, end, finer.spread);
    copy(points.members, done, end, finer.members);
    done = end;
  };
  for (const int64_t i : apart) {
    copy_up_to(i);
    begins.push_back(finer.size());
    replace(i, finer);
    ++done;
  }
  copy_up_to(points.size());
  const auto position = [&](int64_t i) {
    const int64_t after = std::lower_bound(apart.begin(), apart.end(), i) - apart.begin();  // parts before i
    const int64_t next = after < static_cast<int64_t>(apart.size()) ? apart[after] : points.size();
    return (after < static_cast<int64_t>(apart.size()) ? begins[after] : finer.size()) - (next - i);
  };
  Edges edges(K + 1), low(K + 1), high(K + 1);
  finer.ascend();
  for (int64_t k = 0; k <= K; ++k) {
    const int64_t edge = solution.edges[k];
    edges[k] = position(edge);
    low[k] = position(std::max<int64_t>(edge - kReach, 0));
    high[k] = position(std::min(edge + kReach, points.size()));
  }
  settle(finer, edges, low, high, options, scratch, solution);
}

// Moves the edges of a solution on bins to about where they will lie among the values, whose density inside a bin is taken to be
// linear.
void foresee(const Points& points, const KmeansOptions& options, Scratch& scratch, Solution& solution) {
  const int64_t K = static_cast<int64_t>(solution.edges.size()) - 1;
  Edges apart;
  for (int64_t k = 1; k < K; ++k)
    for (int64_t i = std::max<int64_t>(solution.edges[k] - 2, apart.empty() ? 0 : apart.back() + 1); i <= solution.edges[k] + 1 && i < points.size(); ++i)
      if (points.spread[i] > 0) apart.push_back(i);
  Solution guess = solution;
  refine(points, apart, options, scratch, guess, [&](int64_t i, Points& finer) {
    const Points::Members& members = points.members[i];
    const double half = (double(members.high) - members.low) / 2, centre = members.low + half;
    const double tilt = std::clamp(3 * (points.x[i] - centre) / half, -1.0, 1.0);
    for (int part = 0; part < kParts; ++part) {
      const double at = (2 * part + 1) / double(kParts) - 1;
      add(finer, centre + half * at, points.w[i] / kParts * std::max(1 + tilt * at, 0.01), 0, members);
    }
  });
  Edges edges{0};
  for (int64_t k = 1; k < K; ++k) {
    edges.push_back(std::upper_bound(points.x.begin(), points.x.end(), middle(guess, k)) - points.x.begin());
    if (edges[k] <= edges[k - 1] || edges[k] >= points.size()) return;
  }
  edges.push_back(points.size());
  solution = guess;
  solution.edges = edges;
}

}  // namespace

Edges zoom(Points& points, Gathered& values, const KmeansOptions& options, Scratch& scratch, Solution& solution) {
  constexpr int kRounds = 16;
  const int64_t K = static_cast<int64_t>(solution.edges.size()) - 1;
  if (points.members.empty() || K < 2) return {};
  if (values.x.empty()) foresee(points, options, scratch, solution);
  for (int round = 0; round < kRounds; ++round) {
    Edges apart, bins;
    bool missing = false;
    for (int64_t k = 1; k < K; ++k) {
      const double edge = middle(solution, k);
      for (int64_t i = std::max<int64_t>(solution.edges[k] - 2, 0); i <= std::min(solution.edges[k] + 1, points.size() - 1); ++i) {
        const Points::Members& members = points.members[i];
        if (holds(points, i, edge)) {
          missing |= members.bin >= 0;
          if (apart.empty() || apart.back() < i) apart.push_back(i);
        }
        // The edge may move on: the values of the next bin are wanted too, where it is near.
        const double near = kNear * (double(members.high) - members.low);
        if (members.bin >= 0 && members.low - near <= edge && edge <= members.high + near && (bins.empty() || bins.back() < i)) bins.push_back(i);
      }
    }
    if (missing) return bins;
    if (apart.empty()) return {};
    refine(points, apart, options, scratch, solution, [&](int64_t i, Points& finer) {
      take_apart(values, points.members[i].first, points.members[i].last, finer);
    });
    std::swap(points, scratch.finer);
  }
  return {};
}

}  // namespace kmq::cpu
