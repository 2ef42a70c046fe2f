#pragma once
// Our own bug: print the values and abort. The user's fault is an InputError (sim/config.hpp).

#include <fmt/core.h>

#include <cstdio>
#include <cstdlib>

#define ORRERY_CHECK(condition, ...)                                                        \
  do {                                                                                      \
    if (!(condition)) {                                                                     \
      fmt::print(stderr, "{}:{}: CHECK({}) failed: ", __FILE__, __LINE__, #condition);      \
      fmt::print(stderr, __VA_ARGS__);                                                      \
      std::fputc('\n', stderr);                                                             \
      std::abort();                                                                         \
    }                                                                                       \
  } while (false)
