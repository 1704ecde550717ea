// What the drivers of `make sanitize` share.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "kmq.h"

// False, with a word, where KMQ_CPU_PATH names what this processor does not have: `make sanitize` tries every path.
inline bool path_is_there() {
  try {
    kmq::cpu::path();
    return true;
  } catch (const std::runtime_error& error) {
    std::printf("skipped: %s\n", error.what());
    return false;
  }
}

inline void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}
