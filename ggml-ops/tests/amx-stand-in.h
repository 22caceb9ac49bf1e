// AMX for CPUs without it: stands in for the intrinsics that ggml's AMX kernels call. Compiled in by `-include` in the
// build profiles amx-emulated and amx-free (see the Makefile); never part of a build that people use.
//
//   emulated   the tile instructions in plain C++, with the checks that make the hardware fault: for tests.
//   free       AMX_STAND_IN_FREE: tile instructions do nothing and take no time, but that the weights are read. Results
//              are wrong; times are a bound for benchmarks, since all other instructions of the kernels (unpacking,
//              quantization, scales) stay and no CPU has tile instructions that cost less.
//
// Meaning of the instructions: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TILELOADD,
// TILESTORED, TILEZERO, LDTILECFG and TDPBSSD.
#pragma once

#if defined(__cplusplus) && defined(__AMX_INT8__)

#    include <immintrin.h>
#    include <sys/syscall.h>
#    include <unistd.h>

#    include <cstdint>
#    include <cstdio>
#    include <cstdlib>
#    include <cstring>

namespace amx_stand_in {

// the kernel of a CPU without AMX refuses the permission that ggml asks for; every other call goes through
template <typename... Args> inline long system_call(long number, Args... args) {
    return number == SYS_arch_prctl ? 0 : syscall(number, args...);
}

// keeps what the compiler must not drop: the memory that a tile instruction would read or write
inline void touch(const void * memory) {
    asm volatile("" : : "r"(memory) : "memory");
}

#    if defined(AMX_STAND_IN_FREE)

inline void load_config(const void * config) {
    touch(config);
}

// ggml has weights in tiles 0 and 1, 8 rows of 64 bytes: one read per row brings them from memory, as the hardware must
inline void load(int t, const void * base, size_t stride) {
    touch(base);
    for (size_t row = 0; row < (t < 2 ? 8 : 0); row++) {
        (void) *((const volatile char *) base + row * stride);
    }
}

inline void store(int, void * base, size_t) {
    touch(base);
}

inline void zero(int) {}

inline void dot_product(int, int, int) {}

#    else

struct tile {
    int     rows, bytes;  // bytes of a row
    uint8_t data[16][64];
};

inline thread_local tile tiles[8];
inline thread_local bool configured = false;

inline void require(bool holds, const char * what) {
    if (!holds) {
        fprintf(stderr, "error: AMX stand-in: %s: the hardware would fault here\n", what);
        abort();
    }
}

// 64 bytes: palette, first row, 14 reserved, 16 x 2 with the bytes of a row, 16 with the rows
inline void load_config(const void * memory) {
    uint8_t config[64];
    memcpy(config, memory, sizeof(config));
    require(config[0] == 1 && config[1] == 0, "palette 1 and first row 0 expected");
    for (int t = 0; t < 8; t++) {
        tiles[t].bytes = config[16 + 2 * t] | config[17 + 2 * t] << 8;
        tiles[t].rows  = config[48 + t];
        require(tiles[t].bytes <= 64 && tiles[t].rows <= 16, "a tile has at most 16 rows of 64 bytes");
        memset(tiles[t].data, 0, sizeof(tiles[t].data));
    }
    for (int t = 8; t < 16; t++) {
        require(config[16 + 2 * t] == 0 && config[17 + 2 * t] == 0 && config[48 + t] == 0, "there are 8 tiles");
    }
    configured = true;
}

inline tile & used(int t) {
    require(configured && tiles[t].rows > 0 && tiles[t].bytes > 0, "the tile is not configured");
    return tiles[t];
}

inline void load(int t, const void * base, size_t stride) {
    tile & to = used(t);
    for (int row = 0; row < to.rows; row++) {
        memcpy(to.data[row], (const char *) base + row * stride, to.bytes);
    }
}

inline void store(int t, void * base, size_t stride) {
    const tile & from = used(t);
    for (int row = 0; row < from.rows; row++) {
        memcpy((char *) base + row * stride, from.data[row], from.bytes);
    }
}

inline void zero(int t) {
    memset(used(t).data, 0, sizeof(tile::data));
}

// c[m][n] += sum over k of a[m][k] * b[k/4][4n + k%4], products of signed bytes, sums of 32 bits that wrap
inline void dot_product(int c, int a, int b) {
    tile &       sum   = used(c);
    const tile & left  = used(a);
    const tile & right = used(b);
    require(sum.rows == left.rows && sum.bytes == right.bytes && left.bytes == 4 * right.rows,
            "shapes of tiles differ");
    for (int m = 0; m < sum.rows; m++) {
        for (int k = 0; k < left.bytes; k++) {
            const int32_t factor = (int8_t) left.data[m][k];
            for (int n = 0; n < sum.bytes / 4; n++) {
                uint32_t value;
                memcpy(&value, &sum.data[m][4 * n], sizeof(value));
                value += (uint32_t) (factor * (int8_t) right.data[k / 4][4 * n + k % 4]);
                memcpy(&sum.data[m][4 * n], &value, sizeof(value));
            }
        }
    }
}

#    endif

}  // namespace amx_stand_in

#    undef _tile_loadd
#    undef _tile_stored
#    undef _tile_zero
#    undef _tile_dpbssd
#    define syscall                     amx_stand_in::system_call
#    define _tile_loadconfig(config)    amx_stand_in::load_config(config)
#    define _tile_loadd(t, base, step)  amx_stand_in::load(t, base, step)
#    define _tile_stored(t, base, step) amx_stand_in::store(t, base, step)
#    define _tile_zero(t)               amx_stand_in::zero(t)
#    define _tile_dpbssd(c, a, b)       amx_stand_in::dot_product(c, a, b)

#endif
