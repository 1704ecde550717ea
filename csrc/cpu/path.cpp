#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../kmq.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kmq::cpu {
namespace {

enum class Path { scalar, avx2, avx512, amx };

bool have_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

// Whether the processor has tiles of integers, and the kernel lets this process use them: it keeps room for them only when asked.
bool have_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tile) && (d & int8) && syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

Path widest() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
  if (avx512) return have_vnni() && have_amx() ? Path::amx : Path::avx512;
  if (avx2) return Path::avx2;
#endif
  return Path::scalar;
}

// KMQ_CPU_PATH selects the path of lesser processors, for tests.
Path choose() {
  const char* asked = std::getenv("KMQ_CPU_PATH");
  if (!asked || !*asked) return widest();
  for (const auto& [name, path] : {std::pair{"scalar", Path::scalar}, {"avx2", Path::avx2}, {"avx512", Path::avx512}, {"amx", Path::amx}}) {
    if (std::string(asked) != name) continue;
    if (path > widest()) throw std::runtime_error(std::string("KMQ_CPU_PATH=") + asked + ": this processor does not have it");
    return path;
  }
  throw std::runtime_error(std::string("KMQ_CPU_PATH: expected scalar, avx2, avx512 or amx, got ") + asked);
}

Path chosen() {
  static const Path path = choose();
  return path;
}

}  // namespace

bool avx2() { return chosen() >= Path::avx2; }
bool avx512() { return chosen() >= Path::avx512; }
bool amx() { return chosen() == Path::amx; }
bool vnni() {
  static const bool have = have_vnni();
  return avx512() && have;
}
const char* path() { return amx() ? "amx" : avx512() ? "avx512" : avx2() ? "avx2" : "scalar"; }

}  // namespace kmq::cpu
