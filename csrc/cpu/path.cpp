#include <cstdlib>
#include <cstring>

#include "../kmq.h"

namespace kmq::cpu {

bool avx2() {
#if defined(__x86_64__)
  static const bool use = [] {
    const char* asked = std::getenv("KMQ_CPU_PATH");  // "scalar" selects the path of other processors, for tests
    if (asked && std::strcmp(asked, "scalar") == 0) return false;
    return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"));
  }();
  return use;
#else
  return false;
#endif
}

const char* path() { return avx2() ? "avx2" : "scalar"; }

}  // namespace kmq::cpu
