#pragma once
// Before a function with hot loops: compiled for AVX2 and AVX-512 too, and the processor's best is
// taken. Multiplications and additions are not fused (CMakeLists.txt), so that the results do not
// depend on it.

// Sanitizers instrument the functions that choose among clones, which run before they are ready.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define ORRERY_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define ORRERY_CLONES
#endif
