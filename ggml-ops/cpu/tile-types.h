// How blocks of a quantized type become bytes, in words of 4 neighbouring values of a row, a row in every lane (see
// tile-blocks.h). The vectors are those of one CPU family, included before.
//
// A type has
//     SIZE, BYTES   values and bytes of its blocks
//     LIMIT         its bytes are 0 .. LIMIT; where the family does not take so large ones, they are signed
//     OFFSET        which stands for 0
//     SCALES        scales for 32 values: 1 or 2
//     MIN           whether a constant of the block is added to its values
//     unpack()      calls emit(b, words[8], scales[SCALES], min) for every 32 values of a block
#pragma once

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

namespace tile_blocks {

// where the blocks of ROWS rows lie: plain ones `stride` bytes apart; packed ones in one group or two, `stride` bytes apart
struct rows_at {
    const char * at;
    size_t       stride;
};

constexpr int group_rows(tile_layout layout) {
    return layout == ROWS_PLAIN ? 1 : layout == ROWS_4X4 || layout == ROWS_4X8 ? 4 : 8;
}

// weights above MAX_WEIGHT are signed bytes, which have no offset
constexpr int stored_offset(int limit, int offset) {
    return limit > MAX_WEIGHT ? 0 : offset;
}

inline ints low_nibbles(ints v) {
    return bit_and(v, set_bytes(0x0f));
}

inline ints high_nibbles(ints v) {
    return bit_and(shift_right<4>(v), set_bytes(0x0f));
}

// 16 bytes of every row: the first 16 values in the low nibbles, the others in the high ones
inline void split_nibbles(const ints raw[4], ints w[8]) {
    for (int i = 0; i < 4; i++) {
        w[i]     = low_nibbles(raw[i]);
        w[i + 4] = high_nibbles(raw[i]);
    }
}

// byte J of every word
template <int J> inline ints byte_of(ints v) {
    if constexpr (J == 3) {
        return shift_right<24>(v);
    } else {
        return bit_and(shift_right<8 * J>(v), set_words(0xff));
    }
}

// --- blocks of 32 values ----------------------------------------------------------------------------------------------

struct q4_0_type {
    static constexpr int         SIZE = 32, BYTES = sizeof(block_q4_0), LIMIT = 15, OFFSET = 8, SCALES = 1;
    static constexpr bool        MIN    = false;
    static constexpr tile_layout LAYOUT = ROWS_PLAIN;

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        ints raw[4], w[8];
        load_words(r.at + sizeof(ggml_half), r.stride, raw);
        split_nibbles(raw, w);
        const floats d = load_halves(r.at, r.stride);
        emit(0, w, &d, d);
    }
};

struct q4_1_type {
    static constexpr int         SIZE = 32, BYTES = sizeof(block_q4_1), LIMIT = 15, OFFSET = 0, SCALES = 1;
    static constexpr bool        MIN    = true;
    static constexpr tile_layout LAYOUT = ROWS_PLAIN;

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        ints head[4], raw[4], w[8];
        load_words(r.at, r.stride, head);
        load_words(r.at + 4, r.stride, raw);
        split_nibbles(raw, w);
        const floats d = low_halves(head[0]);
        emit(0, w, &d, low_halves(shift_right<16>(head[0])));
    }
};

// nibbles, and their fifth bits in a word per row
inline void unpack_5_bits(const ints raw[4], ints bits, ints w[8]) {
    split_nibbles(raw, w);
    w[0] = add_fifth_bit<0>(w[0], bits);
    w[1] = add_fifth_bit<1>(w[1], bits);
    w[2] = add_fifth_bit<2>(w[2], bits);
    w[3] = add_fifth_bit<3>(w[3], bits);
    w[4] = add_fifth_bit<4>(w[4], bits);
    w[5] = add_fifth_bit<5>(w[5], bits);
    w[6] = add_fifth_bit<6>(w[6], bits);
    w[7] = add_fifth_bit<7>(w[7], bits);
}

struct q5_0_type {
    static constexpr int         SIZE = 32, BYTES = sizeof(block_q5_0), LIMIT = 31, OFFSET = 16, SCALES = 1;
    static constexpr bool        MIN    = false;
    static constexpr tile_layout LAYOUT = ROWS_PLAIN;

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        ints head[4], raw[4], w[8];
        load_words(r.at, r.stride, head);  // the scale and the fifth bits
        load_words(r.at + 6, r.stride, raw);
        unpack_5_bits(raw, bit_or(shift_right<16>(head[0]), shift_left<16>(head[1])), w);
        const floats d = low_halves(head[0]);
        emit(0, w, &d, d);
    }
};

struct q5_1_type {
    static constexpr int         SIZE = 32, BYTES = sizeof(block_q5_1), LIMIT = 31, OFFSET = 0, SCALES = 1;
    static constexpr bool        MIN    = true;
    static constexpr tile_layout LAYOUT = ROWS_PLAIN;

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        ints head[4], raw[4], w[8];
        load_words(r.at, r.stride, head);
        load_words(r.at + 8, r.stride, raw);
        unpack_5_bits(raw, head[1], w);
        const floats d = low_halves(head[0]);
        emit(0, w, &d, low_halves(shift_right<16>(head[0])));
    }
};

template <tile_layout layout> struct q8_0_type {
    static constexpr int SIZE = 32, BYTES = sizeof(block_q8_0), LIMIT = 255, OFFSET = stored_offset(255, 128),
                         SCALES         = 1;
    static constexpr bool        MIN    = false;
    static constexpr tile_layout LAYOUT = layout;

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        ints   w[8];
        floats d;
        if constexpr (layout != ROWS_PLAIN) {
            load_groups<layout>(r.at + group_rows(layout) * sizeof(ggml_half), r.stride, w);
            load_groups<layout>(r.at + group_rows(layout) * (sizeof(ggml_half) + 16), r.stride, w + 4);
            d = load_group_halves<layout>(r.at, r.stride);
        } else {
            load_words(r.at + 2, r.stride, w);
            load_words(r.at + 18, r.stride, w + 4);
            d = load_halves(r.at, r.stride);
        }
        if constexpr (OFFSET != 0) {
            for (ints & v : w) {
                v = bit_xor(v, set_bytes(0x80));
            }
        }
        emit(0, w, &d, d);
    }
};

constexpr uint8_t iq4_code(int value) {
    return (uint8_t) (value + stored_offset(255, 128));
}

// what a nibble stands for
struct iq4_codes {
    static constexpr int     LIMIT = 255, OFFSET = stored_offset(255, 128);
    static constexpr uint8_t TABLE[16] = {
        iq4_code(-127), iq4_code(-104), iq4_code(-83), iq4_code(-65), iq4_code(-49), iq4_code(-35),
        iq4_code(-22),  iq4_code(-10),  iq4_code(1),   iq4_code(13),  iq4_code(25),  iq4_code(38),
        iq4_code(53),   iq4_code(69),   iq4_code(89),  iq4_code(113),
    };
};

struct mxfp4_codes {
    static constexpr int     LIMIT = 24, OFFSET = 12;
    static constexpr uint8_t TABLE[16] = { 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0 };
};

template <typename codes> inline void look_up_nibbles(const ints raw[4], ints w[8]) {
    split_nibbles(raw, w);
    for (int i = 0; i < 8; i++) {
        w[i] = look_up(codes::TABLE, w[i]);
    }
}

template <tile_layout layout> struct iq4_nl_type {
    static constexpr int  SIZE = 32, BYTES = sizeof(block_iq4_nl), LIMIT = iq4_codes::LIMIT, OFFSET = iq4_codes::OFFSET;
    static constexpr int  SCALES        = 1;
    static constexpr bool MIN           = false;
    static constexpr tile_layout LAYOUT = layout;

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        ints   raw[4], w[8];
        floats d;
        if constexpr (layout != ROWS_PLAIN) {
            load_groups<layout>(r.at + group_rows(layout) * sizeof(ggml_half), r.stride, raw);
            d = load_group_halves<layout>(r.at, r.stride);
        } else {
            load_words(r.at + sizeof(ggml_half), r.stride, raw);
            d = load_halves(r.at, r.stride);
        }
        look_up_nibbles<iq4_codes>(raw, w);
        emit(0, w, &d, d);
    }
};

template <tile_layout layout> struct mxfp4_type {
    static constexpr int SIZE = 32, BYTES = sizeof(block_mxfp4), LIMIT = mxfp4_codes::LIMIT,
                         OFFSET         = mxfp4_codes::OFFSET;
    static constexpr int         SCALES = 1;
    static constexpr bool        MIN    = false;
    static constexpr tile_layout LAYOUT = layout;

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        ints raw[4], w[8], e;
        if constexpr (layout != ROWS_PLAIN) {
            load_groups<layout>(r.at + group_rows(layout), r.stride, raw);
            e = load_group_bytes<layout>(r.at, r.stride);
        } else {
            ints head[4];
            load_words(r.at, r.stride, head);
            load_words(r.at + 1, r.stride, raw);
            e = byte_of<0>(head[0]);
        }
        look_up_nibbles<mxfp4_codes>(raw, w);
        // 2^(e - 128): the codes are twice their values; below 2 the bits of a denormal number
        const ints   small = add_words(set_words(0x00200000), shift_left<21>(e));
        const ints   large = shift_left<23>(add_words(e, set_words(0xffffffff)));
        const floats d     = as_floats(select_below_2(e, small, large));
        emit(0, w, &d, d);
    }
};

// --- blocks of 256 values ---------------------------------------------------------------------------------------------

// scales of the 8 sub-blocks of Q4_K and Q5_K, and what is added to their values
struct k_scales {
    floats d[8], min[8];

    // bytes 0 .. 3 of words are sub-blocks 4 half .. 4 half + 3
    void set(int half, floats d_all, floats min_all, ints scale, ints mins) {
        set_one<0>(4 * half, d_all, min_all, scale, mins);
        set_one<1>(4 * half, d_all, min_all, scale, mins);
        set_one<2>(4 * half, d_all, min_all, scale, mins);
        set_one<3>(4 * half, d_all, min_all, scale, mins);
    }

    template <int J> void set_one(int first, floats d_all, floats min_all, ints scale, ints mins) {
        d[first + J]   = multiply(d_all, to_floats(byte_of<J>(scale)));
        min[first + J] = multiply(min_all, to_floats(byte_of<J>(mins)));
    }

    // the head of a plain block: two F16, then 12 bytes
    explicit k_scales(rows_at r) {
        ints head[4];
        load_words(r.at, r.stride, head);
        const ints   low = set_bytes(0x0f), high = set_bytes(0x30), six = set_bytes(0x3f);
        const floats d_all   = low_halves(head[0]);
        const floats min_all = multiply(low_halves(shift_right<16>(head[0])), set_floats(-1.0f));
        set(0, d_all, min_all, bit_and(head[1], six), bit_and(head[2], six));
        set(1, d_all, min_all, bit_or(bit_and(head[3], low), bit_and(shift_right<2>(head[1]), high)),
            bit_or(bit_and(shift_right<4>(head[3]), low), bit_and(shift_right<2>(head[2]), high)));
    }

    // 12 bytes of a packed block are the scales of 8 rows, as those of 8 sub-blocks in a plain one
    static void group_scales(const char * at, uint64_t & scale, uint64_t & mins) {
        uint32_t v[3];
        memcpy(v, at, sizeof(v));
        const uint32_t scale_high = (v[2] & 0x0f0f0f0f) | ((v[0] >> 2) & 0x30303030);
        const uint32_t mins_high  = ((v[2] >> 4) & 0x0f0f0f0f) | ((v[1] >> 2) & 0x30303030);
        scale                     = (v[0] & 0x3f3f3f3f) | (uint64_t) scale_high << 32;
        mins                      = (v[1] & 0x3f3f3f3f) | (uint64_t) mins_high << 32;
    }

    static k_scales of_groups(rows_at r) {
        const floats d_all   = load_group_halves<ROWS_8X8>(r.at, r.stride);
        const floats min_all = multiply(load_group_halves<ROWS_8X8>(r.at + 16, r.stride), set_floats(-1.0f));
        k_scales     s;
        for (int b = 0; b < 8; b++) {
            uint64_t scale[2] = {}, mins[2] = {};
            group_scales(r.at + 32 + 12 * b, scale[0], mins[0]);
            if (ROWS > 8) {
                group_scales(r.at + r.stride + 32 + 12 * b, scale[1], mins[1]);
            }
            s.d[b]   = multiply(d_all, to_floats(group_bytes(scale[0], scale[1])));
            s.min[b] = multiply(min_all, to_floats(group_bytes(mins[0], mins[1])));
        }
        return s;
    }

  private:
    k_scales() = default;
};

template <tile_layout layout> struct q4_K_type {
    static constexpr int         SIZE = 256, BYTES = sizeof(block_q4_K), LIMIT = 15, OFFSET = 0, SCALES = 1;
    static constexpr bool        MIN    = true;
    static constexpr tile_layout LAYOUT = layout;

    static k_scales scales(rows_at r) {
        if constexpr (layout != ROWS_PLAIN) {
            return k_scales::of_groups(r);
        } else {
            return k_scales(r);
        }
    }

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        const k_scales s = scales(r);
        for (int p = 0; p < 4; p++) {  // 64 values: the first 32 in the low nibbles
            ints raw[8], w[8];
            if constexpr (layout != ROWS_PLAIN) {
                load_groups<layout>(r.at + 128 + 256 * p, r.stride, raw);
                load_groups<layout>(r.at + 256 + 256 * p, r.stride, raw + 4);
            } else {
                load_words(r.at + 16 + 32 * p, r.stride, raw);
                load_words(r.at + 32 + 32 * p, r.stride, raw + 4);
            }
            for (int i = 0; i < 8; i++) {
                w[i] = low_nibbles(raw[i]);
            }
            emit(2 * p, w, &s.d[2 * p], s.min[2 * p]);
            for (int i = 0; i < 8; i++) {
                w[i] = high_nibbles(raw[i]);
            }
            emit(2 * p + 1, w, &s.d[2 * p + 1], s.min[2 * p + 1]);
        }
    }
};

struct q5_K_type {
    static constexpr int         SIZE = 256, BYTES = sizeof(block_q5_K), LIMIT = 31, OFFSET = 0, SCALES = 1;
    static constexpr bool        MIN    = true;
    static constexpr tile_layout LAYOUT = ROWS_PLAIN;

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        const k_scales s(r);
        ints           bits[8];  // bit b of a byte belongs to sub-block b
        load_words(r.at + 16, r.stride, bits);
        load_words(r.at + 32, r.stride, bits + 4);
        const ints fifth = set_bytes(0x10);
        for (int p = 0; p < 4; p++) {
            ints raw[8], w[8];
            load_words(r.at + 48 + 32 * p, r.stride, raw);
            load_words(r.at + 64 + 32 * p, r.stride, raw + 4);
            for (int i = 0; i < 8; i++) {
                w[i] = bit_or(low_nibbles(raw[i]), bit_and(shift_left<4>(bits[i]), fifth));
            }
            emit(2 * p, w, &s.d[2 * p], s.min[2 * p]);
            for (int i = 0; i < 8; i++) {
                w[i]    = bit_or(high_nibbles(raw[i]), bit_and(shift_left<3>(bits[i]), fifth));
                bits[i] = shift_right<2>(bits[i]);
            }
            emit(2 * p + 1, w, &s.d[2 * p + 1], s.min[2 * p + 1]);
        }
    }
};

struct q6_K_type {
    static constexpr int         SIZE = 256, BYTES = sizeof(block_q6_K), LIMIT = 63, OFFSET = 32, SCALES = 2;
    static constexpr bool        MIN    = false;
    static constexpr tile_layout LAYOUT = ROWS_PLAIN;

    // scale J of the 4 signed bytes in a word
    template <int J> static floats scale(floats d, ints v) {
        return multiply(d, to_floats(shift_right_signed<24>(shift_left<24 - 8 * J>(v))));
    }

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        ints tail[4], scales[4];
        load_words(r.at + 192, r.stride, scales);
        load_words(r.at + 194, r.stride, tail);  // the last two bytes are the scale of the block
        const floats d_all = low_halves(shift_right<16>(tail[3]));
        const ints   high  = set_bytes(0x30);
        for (int half = 0; half < 2; half++) {
            ints a[8], c[8], h[8], w[8];
            load_words(r.at + 64 * half, r.stride, a);
            load_words(r.at + 64 * half + 16, r.stride, a + 4);
            load_words(r.at + 64 * half + 32, r.stride, c);
            load_words(r.at + 64 * half + 48, r.stride, c + 4);
            load_words(r.at + 128 + 32 * half, r.stride, h);
            load_words(r.at + 128 + 32 * half + 16, r.stride, h + 4);
            const ints   s0 = scales[2 * half], s1 = scales[2 * half + 1];
            const floats d[8] = { scale<0>(d_all, s0), scale<1>(d_all, s0), scale<2>(d_all, s0), scale<3>(d_all, s0),
                                  scale<0>(d_all, s1), scale<1>(d_all, s1), scale<2>(d_all, s1), scale<3>(d_all, s1) };
            for (int i = 0; i < 8; i++) {
                w[i] = bit_or(low_nibbles(a[i]), bit_and(shift_left<4>(h[i]), high));
            }
            emit(4 * half, w, d, d_all);
            for (int i = 0; i < 8; i++) {
                w[i] = bit_or(low_nibbles(c[i]), bit_and(shift_left<2>(h[i]), high));
            }
            emit(4 * half + 1, w, d + 2, d_all);
            for (int i = 0; i < 8; i++) {
                w[i] = bit_or(high_nibbles(a[i]), bit_and(h[i], high));
            }
            emit(4 * half + 2, w, d + 4, d_all);
            for (int i = 0; i < 8; i++) {
                w[i] = bit_or(high_nibbles(c[i]), bit_and(shift_right<2>(h[i]), high));
            }
            emit(4 * half + 3, w, d + 6, d_all);
        }
    }
};

struct iq4_xs_type {
    static constexpr int SIZE = 256, BYTES = sizeof(block_iq4_xs), LIMIT = iq4_codes::LIMIT, OFFSET = iq4_codes::OFFSET;
    static constexpr int SCALES         = 1;
    static constexpr bool        MIN    = false;
    static constexpr tile_layout LAYOUT = ROWS_PLAIN;

    template <typename F> static inline __attribute__((always_inline)) void unpack(rows_at r, F && emit) {
        ints head[4];
        load_words(r.at, r.stride, head);
        const floats d_all = low_halves(head[0]), zero = multiply(d_all, set_floats(-32.0f));
        ints         low = head[1], high = shift_right<16>(head[0]);  // 4 and 2 bits of every scale
        for (int b = 0; b < 8; b++) {
            const ints   scale = bit_or(bit_and(low, set_words(15)), shift_left<4>(bit_and(high, set_words(3))));
            const floats d     = multiply_add(d_all, to_floats(scale), zero);
            low                = shift_right<4>(low);
            high               = shift_right<2>(high);
            ints raw[4], w[8];
            load_words(r.at + 8 + 16 * b, r.stride, raw);
            look_up_nibbles<iq4_codes>(raw, w);
            emit(b, w, &d, d);
        }
    }
};

}  // namespace tile_blocks
