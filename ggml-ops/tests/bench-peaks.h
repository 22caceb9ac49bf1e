// What bounds arithmetic in the tables of bench-ops: the rate of the multiply-add instructions that the library was compiled
// for, measured in registers, by all threads together at the best of many short rounds. 0: not known for this CPU.
#pragma once

#include "bench-ops.h"

#if defined(__x86_64__) && defined(__GNUC__)
#    include <immintrin.h>
#    define BENCH_X86 1
#else
#    define BENCH_X86 0
#endif

constexpr int64_t PEAK_LOOPS = 100000;
constexpr int     PEAK_SUMS  = 12;  // independent ones, to hide the latency

#if BENCH_X86
// n rounds of PEAK_SUMS instructions; the compiler may neither drop nor hoist one
#    define PEAK_LOOP(name, isa, vec, zero, step)                              \
        __attribute__((target(isa))) inline void name(int64_t n) {             \
            vec a[PEAK_SUMS], x = zero, y = zero;                              \
            for (vec & sum : a) {                                              \
                sum = zero;                                                    \
            }                                                                  \
            for (int64_t i = 0; i < n; i++) {                                  \
                asm volatile("" : "+v"(x), "+v"(y));                           \
                _Pragma("GCC unroll 12") for (int j = 0; j < PEAK_SUMS; j++) { \
                    a[j] = step;                                               \
                    asm volatile("" : "+v"(a[j]));                             \
                }                                                              \
            }                                                                  \
        }
PEAK_LOOP(peak_fma_512, "avx512f", __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(a[j], x, y))
PEAK_LOOP(peak_fma_256, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_fmadd_ps(a[j], x, y))
PEAK_LOOP(peak_dot_512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), _mm512_dpbusd_epi32(a[j], x, y))
PEAK_LOOP(peak_dot_256,
          "avx2",
          __m256i,
          _mm256_setzero_si256(),
          _mm256_add_epi16(a[j], _mm256_maddubs_epi16(x, y)))  // sums of 16 bits, as the fastest kernels form them
#    if defined(__clang__) || __GNUC__ >= 11
#        define BENCH_AVX_VNNI 1
PEAK_LOOP(peak_dot_vnni, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), _mm256_dpbusd_avx_epi32(a[j], x, y))
#    else
#        define BENCH_AVX_VNNI 0
#    endif
#endif

// 10^9 multiply-adds per second, of `width` per instruction
inline double peak_rate(int n_threads, void (*loop)(int64_t), int width) {
    std::vector<double>      best(n_threads, 1e30);
    std::vector<std::thread> threads;
    for (double & b : best) {
        threads.emplace_back([&b, loop] {
            for (int round = 0; round < 200; round++) {
                const double start = now_ms();
                loop(PEAK_LOOPS);
                b = std::min(b, now_ms() - start);
            }
        });
    }
    double total = 0.0;
    for (int i = 0; i < n_threads; i++) {
        threads[i].join();
        total += (double) PEAK_SUMS * width * PEAK_LOOPS / 1e6 / best[i];
    }
    return total;
}

// of float32, in 10^9 multiply-adds per second
inline double fma_peak(int n_threads) {
#if BENCH_X86
    if (cpu_has("FMA")) {
        return cpu_has("AVX512") ? peak_rate(n_threads, peak_fma_512, 16) : peak_rate(n_threads, peak_fma_256, 8);
    }
#endif
    (void) n_threads;
    return 0.0;
}

// of 8-bit integers
inline double int8_peak(int n_threads) {
#if BENCH_X86
    if (cpu_has("AVX512_VNNI")) {
        return peak_rate(n_threads, peak_dot_512, 64);
    }
#    if BENCH_AVX_VNNI
    if (cpu_has("AVX_VNNI")) {
        return peak_rate(n_threads, peak_dot_vnni, 32);
    }
#    endif
    if (cpu_has("AVX2")) {
        return peak_rate(n_threads, peak_dot_256, 32);
    }
#endif
    (void) n_threads;
    return 0.0;
}

// of products with weights of this type
inline double type_peak(int n_threads, ggml_type type) {
    return ggml_is_quantized(type) ? int8_peak(n_threads) : fma_peak(n_threads);
}

// the least milliseconds: bytes read once at this bandwidth, or multiply-adds at this rate, whichever takes longer
inline double limit_ms(double bytes, double gbs, double macs, double peak) {
    return std::max(bytes / gbs / 1e6, peak > 0.0 ? macs / peak / 1e6 : 0.0);
}
