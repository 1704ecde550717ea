#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../kmq.h"

namespace kmq::cpu {
namespace {

enum class Path { scalar, avx2, avx512 };

Path widest() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
  if (avx2) return avx512 ? Path::avx512 : Path::avx2;
#endif
  return Path::scalar;
}

// KMQ_CPU_PATH selects the path of lesser processors, for tests.
Path choose() {
  const char* asked = std::getenv("KMQ_CPU_PATH");
  if (!asked || !*asked) return widest();
  for (const auto& [name, path] : {std::pair{"scalar", Path::scalar}, {"avx2", Path::avx2}, {"avx512", Path::avx512}}) {
    if (std::string(asked) != name) continue;
    if (path > widest()) throw std::runtime_error(std::string("KMQ_CPU_PATH=") + asked + ": this processor does not have it");
    return path;
  }
  throw std::runtime_error(std::string("KMQ_CPU_PATH: expected scalar, avx2 or avx512, got ") + asked);
}

Path chosen() {
  static const Path path = choose();
  return path;
}

bool have_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

}  // namespace

bool avx2() { return chosen() >= Path::avx2; }
bool avx512() { return chosen() == Path::avx512; }
bool vnni() {
  static const bool have = have_vnni();
  return avx512() && have;
}
const char* path() { return avx512() ? "avx512" : avx2() ? "avx2" : "scalar"; }

}  // namespace kmq::cpu
