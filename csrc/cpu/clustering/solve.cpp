// One problem on points: the best partition over cells, polished on all points, Lloyd, and the lower bound of the optimum.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kmeans.h"

namespace kmq::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Mean of points [i, j). Next to weights ten decades larger, the prefix sums hold little of a light cluster: it is added afresh.
double mean_of(const Points& points, const Sums& sums, int64_t i, int64_t j) {
  if (sums.moments) return std::clamp(sums.moment(i, j).mean, points.x[i], points.x[j - 1]);
  double weight = sums.weight(i, j), first = sums.wx[j] - sums.wx[i];
  if (j - i <= 4 || weight < 1e-4 * sums.weight(0, sums.n)) {
    weight = first = 0;
    for (int64_t p = i; p < j; ++p) {
      const double w = points.w.empty() ? 1.0 : points.w[p];
      weight += w;
      first += w * (points.x[p] - sums.origin);
    }
  }
  return std::clamp(sums.origin + first / weight, points.x[i], points.x[j - 1]);
}

// A number near the cube root, monotone in x; only the resolution of the grid depends on it.
double rough_cube_root(double x) {
  uint64_t u;
  std::memcpy(&u, &x, 8);
  u = u / 3 + 0x2A9F7893782DA1CEull;
  double root;
  std::memcpy(&root, &u, 8);
  return root;
}

// The integral of density^(1/3), from a few equal shares of the points.
double growth_of(const Points& points, const Sums& sums, int num_centroids) {
  const int64_t n = points.size(), share = std::max<int64_t>(1, n / (4 * num_centroids));
  double growth = 0;
  for (int64_t i = 0; i + share < n; i += share) {
    const double width = points.x[i + share] - points.x[i];
    growth += rough_cube_root(width * width * sums.weight(i, i + share));
  }
  return growth;
}

// Edges of at most about 2 * count cells of neighbouring points. Optimal intervals lie where density^(1/3) grows, so that is
// where the cells are; equal steps over the range keep cells in the tails narrow. `growth` is the integral of density^(1/3).
Edges make_cells(const Points& points, int64_t count, double& growth) {
  const std::vector<double>&x = points.x, &w = points.w;
  const int64_t n = points.size();
  std::vector<double> grows(n);
  for (int64_t i = 0; i < n; ++i) {
    const double step = i + 1 < n ? x[i + 1] - x[i] : x[i] - x[i - 1];
    const double mass = (w.empty() ? 1.0 : w[i]) * step * step;
    grows[i] = mass > 1e-280 ? rough_cube_root(mass) : 0;
  }
  double total = 0;
  for (int round = 0; round < 5; ++round) {  // a gap before an outlier needs one cell, not most of them
    const double limit = round ? total / count : kInfinity;
    total = 0;
    for (double& g : grows) total += g = std::min(g, limit);
  }
  growth = total;
  Edges cells{0};
  const double by_density = total > 0 ? count / total : 0, by_range = count / (x[n - 1] - x[0]);
  double grown = 0;
  int64_t density_cell = 0, range_cell = 0;
  for (int64_t i = 0; i < n; ++i) {
    grown += grows[i];
    const int64_t d = static_cast<int64_t>(grown * by_density), r = static_cast<int64_t>((x[i] - x[0]) * by_range);
    if (i && (d != density_cell || r != range_cell)) cells.push_back(i);
    density_cell = d;
    range_cell = r;
  }
  cells.push_back(n);
  return cells;
}

// Gives every cluster a member: one without any takes the end point of the cluster that loses most by keeping it. Returns whether
// there was one.
bool fill_empty(const Points& points, const Sums& sums, Edges& edges) {
  const int64_t K = static_cast<int64_t>(edges.size()) - 1;
  for (bool filled = false;; filled = true) {
    int64_t empty = 0;
    while (empty < K && edges[empty + 1] > edges[empty]) ++empty;
    if (empty == K) return filled;
    double most = -1;
    int64_t cut = 0;
    for (int64_t k = 0; k < K; ++k) {
      if (edges[k + 1] - edges[k] < 2) continue;
      const double c = mean_of(points, sums, edges[k], edges[k + 1]);
      for (const int64_t i : {edges[k], edges[k + 1] - 1}) {
        const double gain = (points.w.empty() ? 1.0 : points.w[i]) * (points.x[i] - c) * (points.x[i] - c);
        if (gain > most) {
          most = gain;
          cut = i == edges[k] ? i + 1 : i;
        }
      }
    }
    edges.erase(edges.begin() + (empty + 1 < K ? empty + 1 : empty));
    edges.insert(std::lower_bound(edges.begin(), edges.end(), cut), cut);
  }
}

// Lloyd iterations until the partition stands still, the centroids move less than tol * variance, or max_iter; beyond the last only
// where a cluster would be left empty. Where there are edges already, the centroids are the means of their intervals, and so they are
// in the end.
void lloyd(const Points& points, const Sums& sums, const KmeansOptions& options, double tol, Solution& solution) {
  constexpr int kMore = 100;
  const int64_t n = points.size(), K = static_cast<int64_t>(solution.centroids.size());
  const double threshold = tol > 0 ? tol * (sums.cost(0, n) / sums.weight(0, n)) : 0;
  std::vector<double>& c = solution.centroids;
  Edges next(K + 1);
  bool last = solution.n_iter >= options.max_iter;
  for (int more = 0;;) {
    next[0] = 0;
    next[K] = n;
    for (int64_t k = 1; k < K; ++k)
      next[k] = std::upper_bound(points.x.begin() + next[k - 1], points.x.end(), (c[k - 1] + c[k]) / 2) - points.x.begin();
    const bool filled = fill_empty(points, sums, next);
    if (last && (!filled || more++ == kMore)) return;
    if (!last) ++solution.n_iter;
    if (next == solution.edges) return;
    solution.edges = next;
    double shift = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double moved = mean_of(points, sums, next[k], next[k + 1]);
      shift += (moved - c[k]) * (moved - c[k]);
      c[k] = moved;
    }
    last |= solution.n_iter >= options.max_iter || (tol > 0 && shift <= threshold);
  }
}

// splitmix64
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
};

// k-means++: each centroid is drawn with chances weight * squared distance to the nearest one so far. The mass of a range of
// points that share their nearest centroid comes from the prefix sums, so a draw costs K + log n and not n.
std::vector<double> plus_plus(const Points& points, const Sums& sums, int num_centroids, Random random) {
  const int64_t n = points.size();
  std::vector<double> chosen;
  {
    const double at = sums.w[0] + random.uniform() * sums.weight(0, n);
    const int64_t i = std::upper_bound(sums.w.begin() + 1, sums.w.begin() + n + 1, at) - sums.w.begin() - 1;
    chosen.push_back(points.x[std::min(i, n - 1)]);
  }
  while (static_cast<int>(chosen.size()) < num_centroids) {
    const int64_t K = static_cast<int64_t>(chosen.size());
    const auto mass = [&](int64_t i, int64_t j, double c) {
      const double y = c - sums.origin;
      return std::max(0.0, (sums.wxx[j] - sums.wxx[i]) - 2 * y * (sums.wx[j] - sums.wx[i]) + y * y * (sums.w[j] - sums.w[i]));
    };
    Edges edges(K + 1, 0);
    std::vector<double> grown(K + 1, 0.0);
    edges[K] = n;
    for (int64_t k = 1; k < K; ++k)
      edges[k] = std::upper_bound(points.x.begin(), points.x.end(), (chosen[k - 1] + chosen[k]) / 2) - points.x.begin();
    for (int64_t k = 0; k < K; ++k) grown[k + 1] = grown[k] + mass(edges[k], edges[k + 1], chosen[k]);
    const double at = random.uniform() * grown[K];
    const int64_t k = std::min<int64_t>(std::upper_bound(grown.begin() + 1, grown.end(), at) - grown.begin() - 1, K - 1);
    int64_t low = edges[k], high = edges[k + 1] - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (grown[k] + mass(edges[k], middle + 1, chosen[k]) > at) high = middle;
      else low = middle + 1;
    }
    chosen.insert(std::lower_bound(chosen.begin(), chosen.end(), points.x[low]), points.x[low]);
  }
  return chosen;
}

std::vector<double> initial(const Points& points, const Sums& sums, int num_centroids, const KmeansOptions& options) {
  const int64_t n = points.size();
  std::vector<double> out(num_centroids);
  Random random{options.seed};
  switch (options.init) {
    case KmeansInit::plus_plus: return plus_plus(points, sums, num_centroids, random);
    case KmeansInit::linear:
      for (int k = 0; k < num_centroids; ++k)
        out[k] = num_centroids == 1 ? points.x[0] : points.x[0] + (points.x[n - 1] - points.x[0]) * k / (num_centroids - 1);
      return out;
    case KmeansInit::quantile:
      for (int k = 0; k < num_centroids; ++k) {
        const double at = sums.w[0] + (k + 0.5) / num_centroids * sums.weight(0, n);
        out[k] = points.x[std::min<int64_t>(std::lower_bound(sums.w.begin() + 1, sums.w.begin() + n + 1, at) - sums.w.begin() - 1, n - 1)];
      }
      return out;
    case KmeansInit::random: break;
  }
  std::vector<int64_t> drawn;  // Floyd's sampling without replacement
  for (int64_t j = n - num_centroids; j < n; ++j) {
    const int64_t i = static_cast<int64_t>(random.uniform() * double(j + 1));
    drawn.push_back(std::find(drawn.begin(), drawn.end(), i) == drawn.end() ? i : j);
  }
  std::sort(drawn.begin(), drawn.end());
  for (int k = 0; k < num_centroids; ++k) out[k] = points.x[drawn[k]];
  return out;
}

// Lower bound of the optimum from the optimum over whole cells. `inside` is the squared error of the points of each cell
// around their mean. The best centroids C split at most K - 1 cells. Move the points of these cells to their means: the vector
// of distances to C changes by no more than sqrt(S), S the sum of the K - 1 largest of `inside`. Now no cell is split, so the
// moved points cost at least the optimum over whole cells less the error inside the split ones:
//     sqrt(optimum) >= sqrt(whole - S) - sqrt(S).
// The spread of values inside a point is left out of `whole`, which only lowers the bound, but belongs to S: points whose
// values are spread are cells of their own kind, so their spread must be given in `inside` too.
double lower_bound(double cell_cost, double rounding, std::vector<double> inside, std::vector<double> spread, double blur, double weight,
                   int num_centroids) {
  double whole = cell_cost - rounding, split = 0;
  for (size_t i = 0; i < inside.size(); ++i) {
    whole += inside[i];
    spread[i] += inside[i];
  }
  const size_t most = std::min<size_t>(num_centroids - 1, spread.size());
  std::partial_sort(spread.begin(), spread.begin() + most, spread.end(), std::greater<double>());
  for (size_t i = 0; i < most; ++i) split += spread[i];
  const double root = std::sqrt(std::max(whole - split, 0.0)) - std::sqrt(split) - std::sqrt(weight) * blur;
  return root > 0 ? root * root : 0;
}

// Ranges around the edges that do not overlap, each of them inside [low, high] of the edge where that is possible.
template <typename Low, typename High>
void ranges_around(const Edges& edges, const Low& low_of, const High& high_of, Edges& low, Edges& high) {
  const size_t K = edges.size() - 1;
  low.resize(K + 1);
  high.resize(K + 1);
  low[0] = high[0] = 0;
  low[K] = high[K] = edges[K];
  for (size_t k = 1; k < K; ++k) {
    low[k] = std::max(low_of(k), (edges[k - 1] + edges[k]) / 2 + 1);
    high[k] = std::min(high_of(k), (edges[k] + edges[k + 1]) / 2);
  }
}

// Moves the edges of whole cells to the best points within a cell on either side, and on as long as one reaches that far.
void polish(const Sums& sums, const Edges& cells, const Edges& cell_edges, PartitionScratch& scratch, Edges& edges) {
  const int64_t last = static_cast<int64_t>(cells.size()) - 1, K = static_cast<int64_t>(cell_edges.size()) - 1;
  Edges low, high, reach(K + 1);
  edges.resize(K + 1);
  for (int64_t k = 0; k <= K; ++k) edges[k] = cells[cell_edges[k]];
  const auto below = [&](int64_t k) { return cells[std::max<int64_t>(cell_edges[k] - 1, 0)]; };
  const auto above = [&](int64_t k) { return cells[std::min(cell_edges[k] + 1, last)]; };
  for (int64_t k = 0; k <= K; ++k) reach[k] = std::max(edges[k] - below(k), above(k) - edges[k]);
  for (int round = 0; round < 8; ++round) {
    ranges_around(edges, [&](int64_t k) { return edges[k] - reach[k]; }, [&](int64_t k) { return edges[k] + reach[k]; }, low, high);
    const Edges before = edges;
    best_nearby(sums, low, high, scratch, edges);
    bool reached = false;
    for (int64_t k = 1; k < K; ++k) reached |= edges[k] != before[k] && (edges[k] == low[k] || edges[k] == high[k]);
    if (!reached) return;
  }
}

// The best partition, on scratch.sums of the points; of many points, over cells and then polished.
void best(const Points& points, int num_centroids, const KmeansOptions& options, Scratch& scratch, Solution& out) {
  const int64_t n = points.size(), K = num_centroids;
  const Sums& sums = scratch.sums;
  out.centroids.clear();
  out.n_iter = 0;
  const int64_t count = std::min<int64_t>(std::max<int64_t>(32 * K, 1024), 4096);
  const bool every_point = options.algorithm == KmeansAlgorithm::exact || n <= (points.spread.empty() ? kSmall : 2 * count);
  const bool exact = every_point && points.spread.empty();
  double growth = 0, cost = 0;
  Edges cells;
  if (exact) growth = growth_of(points, sums, num_centroids);
  else cells = make_cells(points, count, growth);
  double guess = growth * growth * growth / (6.0 * double(K) * double(K) * double(K));
  if (!(guess > 0 && std::isfinite(guess))) guess = 1;
  if (exact) {
    const BestPrice best = best_partition(sums, K, guess * scratch.known.price_ratio, scratch.known.slope, scratch.partition, out.edges);
    for (int k = 0; k < num_centroids; ++k) {
      out.centroids.push_back(mean_of(points, sums, out.edges[k], out.edges[k + 1]));
      cost += sums.cost(out.edges[k], out.edges[k + 1]);
    }
    out.lower_bound = std::max(cost - sums.rounding, 0.0);
    if (cost > 0) {
      scratch.known.slope += 0.25 * (best.price * double(K) / cost - scratch.known.slope);
      scratch.known.price_ratio += 0.25 * (scratch.known.slope * cost / double(K) / guess - scratch.known.price_ratio);
    }
    out.cost = cost;
    return;
  }
  if (every_point) {
    cells.resize(n + 1);
    for (int64_t i = 0; i <= n; ++i) cells[i] = i;
  }
  const int64_t m = static_cast<int64_t>(cells.size()) - 1;
  Sums& over_cells = scratch.cell_sums;
  over_cells.pick(sums, cells);
  std::vector<double> inside(m, 0.0), spread(m, 0.0);
  double within = 0;
  for (int64_t i = 0; i < m; ++i) {
    inside[i] = cells[i + 1] - cells[i] > 1 ? sums.cost(cells[i], cells[i + 1]) : 0.0;
    within += inside[i];
    if (!points.spread.empty())
      for (int64_t p = cells[i]; p < cells[i + 1]; ++p) spread[i] += points.spread[p];
  }
  Edges cell_edges;
  best_partition(over_cells, K, guess, 2, scratch.partition, cell_edges);
  for (int64_t k = 0; k < K; ++k) cost += over_cells.cost(cell_edges[k], cell_edges[k + 1]);
  polish(sums, cells, cell_edges, scratch.partition, out.edges);
  for (int64_t k = 0; k < K; ++k) out.centroids.push_back(mean_of(points, sums, out.edges[k], out.edges[k + 1]));
  out.lower_bound = lower_bound(cost - within, sums.rounding, inside, spread, points.blur, sums.weight(0, n), num_centroids);
  lloyd(points, sums, options, 0.0, out);
  out.cost = cost;
}

}  // namespace

void solve(const Points& points, int num_centroids, const KmeansOptions& options, Scratch& scratch, Solution& out) {
  const int64_t n = points.size(), K = num_centroids;
  out.centroids.clear();
  out.edges.clear();
  out.n_iter = 0;
  out.lower_bound = 0;
  if (n <= K) {
    out.centroids.assign(points.x.begin(), points.x.end());
    out.centroids.resize(K, points.x.back());
    return;
  }
  Sums& sums = scratch.sums;
  sums.set(points);
  if (options.algorithm == KmeansAlgorithm::lloyd) {
    out.centroids = initial(points, sums, num_centroids, options);
    lloyd(points, sums, options, options.tol, out);
    out.lower_bound = -1;
    return;
  }
  // About what K clusters of an even density cost. Where not even that is resolved, the partition would be one of rounding errors.
  if (sums.resolve(1e4 * (sums.wxx[n] - sums.wxx[0]) / double(K * K))) {
    best(points, num_centroids, options, scratch, out);
    if (sums.resolve(out.cost)) return;
  }
  scratch.moments.set(points);
  sums.use(scratch.moments);
  best(points, num_centroids, options, scratch, out);
}

void settle(const Points& points, const Edges& edges, const Edges& low, const Edges& high, const KmeansOptions& options, Scratch& scratch,
            Solution& solution) {
  Sums& sums = scratch.sums;
  sums.set(points);
  double cost = 0;
  for (size_t k = 0; k + 1 < edges.size(); ++k) cost += sums.cost(edges[k], edges[k + 1]);
  if (!sums.resolve(cost)) {
    scratch.moments.set(points);
    sums.use(scratch.moments);
  }
  Edges from, to;
  ranges_around(edges, [&](int64_t k) { return low[k]; }, [&](int64_t k) { return high[k]; }, from, to);
  best_nearby(sums, from, to, scratch.partition, solution.edges);
  for (size_t k = 0; k + 1 < edges.size(); ++k)
    solution.centroids[k] = mean_of(points, sums, solution.edges[k], solution.edges[k + 1]);
  lloyd(points, sums, options, 0.0, solution);
}

}  // namespace kmq::cpu
