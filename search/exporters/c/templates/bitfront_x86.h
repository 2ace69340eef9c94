/* Kernels for x86-64, chosen at run time: AVX2, or AVX-512 with VNNI.
 *
 * Weights are repacked once into the arena, 16 output channels side by side and four taps of each
 * together. Activations enter as they are stored, 0..255 (signed ones plus 128), padding holds the
 * zero point, and zero * (sum of weights) is taken off at the end: equal to centred activations,
 * since no tap is missing. Sums wrap in 32 bits on the way and end inside them. */
#ifndef BITFRONT_X86_H
#define BITFRONT_X86_H

#include <immintrin.h>

#include "bitfront_kernels.h"

#define BF_AVX2 __attribute__((target("avx2")))
#define BF_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define BF_INLINE static inline __attribute__((always_inline, unused))

enum { BF_LANES = 16 };

/* A layer for these kernels. Each output position reads `runs` stretches of `length` bytes. */
typedef struct {
    int32_t in_h, in_w, channels, out_h, out_w, out_channels, groups;
    int32_t stride_h, stride_w, dilation_h, dilation_w;
    int32_t top, left, padded_h, padded_w;
    int32_t runs, per_line, length; /* runs in all, runs of one kernel row, bytes of a run */
    int32_t flip;                   /* 128 for signed activations: added to them */
    int32_t zero_in, is_long, zero, low, high; /* is_long: 32-bit results */
    int32_t scaled;                 /* weight = factor * byte + addend, else the byte itself */
    int32_t depth;                  /* bundles of four taps whose 16-bit sums stay below, or 0 */
    int32_t copies;                 /* activations are padded or flipped: read from a copy */
} bf_fast_conv;

static inline bf_fast_conv bf_fast_of(const bf_conv *c)
{
    bf_fast_conv f;
    const int32_t per_group = c->channels / c->groups;
    const int32_t merges = c->groups == 1 && c->dilation[2] == 1; /* taps of a row side by side */
    f.in_h = c->in[1];
    f.in_w = c->in[2];
    f.channels = c->channels;
    f.out_h = c->out[1];
    f.out_w = c->out[2];
    f.out_channels = c->out_channels;
    f.groups = c->groups;
    f.stride_h = c->stride[1];
    f.stride_w = c->stride[2];
    f.dilation_h = c->dilation[1];
    f.dilation_w = c->dilation[2];
    f.top = c->pad[1];
    f.left = c->pad[2];
    f.padded_h = (f.out_h - 1) * f.stride_h + (c->kernel[1] - 1) * f.dilation_h + 1;
    f.padded_w = (f.out_w - 1) * f.stride_w + (c->kernel[2] - 1) * f.dilation_w + 1;
    if (f.padded_h < f.top + f.in_h) f.padded_h = f.top + f.in_h;
    if (f.padded_w < f.left + f.in_w) f.padded_w = f.left + f.in_w;
    f.per_line = merges ? 1 : c->kernel[2];
    f.runs = c->kernel[1] * f.per_line;
    f.length = merges ? per_group * c->kernel[2] : per_group;
    f.flip = c->in_type == BF_INT8 ? 128 : 0;
    f.zero_in = c->in_zero + f.flip;
    f.is_long = c->out_type == BF_INT32;
    f.zero = c->zero;
    f.low = c->low;
    f.high = c->high;
    f.scaled = c->scaled;
    f.depth = c->depth;
    f.copies = f.flip || f.padded_h != f.in_h || f.padded_w != f.in_w || f.length % 4;
    return f;
}

/* Behind the weights of 16 channels. Even and odd channels apart, as 64-bit products want them. */
typedef struct {
    int32_t correction[BF_LANES], factor[BF_LANES], addend[BF_LANES], multiplier[BF_LANES];
    int64_t offset[2][BF_LANES / 2], shift[2][BF_LANES / 2];
} bf_lanes;

static inline int bf_level(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))
        return 2;
    return __builtin_cpu_supports("avx2") ? 1 : 0;
}

BF_INLINE int32_t bf_quads(const bf_fast_conv *f)
{
    return (f->length + 3) / 4;
}

BF_INLINE size_t bf_group_bytes(const bf_fast_conv *f)
{
    return (size_t)(f->runs * bf_quads(f)) * 64u + sizeof(bf_lanes);
}

/* Where tap `run` begins, in bytes from the first one of an output position. */
BF_INLINE int32_t bf_run_at(const bf_fast_conv *f, int32_t run)
{
    const int32_t h = run / f->per_line, w = run % f->per_line;
    return (h * f->dilation_h * f->padded_w + w * f->dilation_w) * f->channels;
}

BF_INLINE void bf_fill(uint8_t *to, int32_t value, size_t n)
{
    for (size_t i = 0; i < n; i++) to[i] = (uint8_t)value;
}

/* Weights and constants of a layer into `to`: per group and 16 channels the taps, then bf_lanes. */
BF_KERNEL void bf_repack(const bf_conv *c, const bf_rows *rows, int16_t *row, uint8_t *to)
{
    const bf_fast_conv plan = bf_fast_of(c), *f = &plan;
    const int32_t per_group = f->out_channels / f->groups;
    const int32_t bundles = (per_group + BF_LANES - 1) / BF_LANES, quads = bf_quads(f);
    const int32_t n = c->kernel[0] * c->kernel[1] * c->kernel[2] * (c->channels / c->groups);
    const size_t pitch = bf_group_bytes(f), weights = (size_t)(f->runs * quads) * 64u;
    int32_t number = 0;
    bf_fill(to, 0, pitch * (size_t)(bundles * f->groups));
    for (int32_t b = 0; b < c->n_blocks; b++) {
        const bf_block *block = &rows->blocks[b];
        for (int32_t r = 0; r < block->rows; r++, number++) {
            const int32_t channel = rows->order ? rows->order[number] : number;
            const int32_t within = channel % per_group, lane = within % BF_LANES;
            const int32_t set = c->n_shared == 1 ? 0 : number;
            const int32_t addend = rows->addends ? rows->addends[number] : block->addend;
            uint8_t *bundle =
                to + pitch * (size_t)(channel / per_group * bundles + within / BF_LANES);
            bf_lanes *lanes = (bf_lanes *)(void *)(bundle + weights);
            int32_t sum = 0, least = 0, most = 0, factor = 1, shift = 0;
            if (block->kind)
                bf_decode(row, n, rows->data + block->offset + (size_t)r * (size_t)block->row_bytes,
                          block->kind, block->factor, addend);
            for (int32_t i = 0; block->kind && i < n; i++) {
                sum += row[i];
                least = row[i] < least ? row[i] : least;
                most = row[i] > most ? row[i] : most;
            }
            if (least < -128 || most > 127) { /* 8-bit codes whose levels are offset */
                factor = block->factor;
                shift = factor == 2 ? 1 : addend + 128;
            }
            for (int32_t i = 0; block->kind && i < n; i++) {
                const int32_t at = i / f->length * quads * 4 + i % f->length;
                bundle[(size_t)(at / 4) * 64u + (size_t)(lane * 4 + at % 4)] =
                    (uint8_t)((row[i] - shift) / factor);
            }
            lanes->correction[lane] = -sum * f->zero_in;
            lanes->factor[lane] = factor;
            lanes->addend[lane] = shift;
            lanes->multiplier[lane] = rows->multiplier[set];
            lanes->offset[lane & 1][lane / 2] = rows->offset[set];
            lanes->shift[lane & 1][lane / 2] = rows->shift[set];
        }
    }
}

/* The source with its padding, as unsigned bytes. */
BF_KERNEL void bf_pad(const bf_fast_conv *f, const uint8_t *in, uint8_t *out)
{
    const size_t line = (size_t)(f->padded_w * f->channels);
    const size_t before = (size_t)(f->left * f->channels);
    const size_t own = (size_t)(f->in_w * f->channels);
    bf_fill(out, f->zero_in, line * (size_t)f->top + before);
    uint8_t *to = out + line * (size_t)f->top + before;
    for (int32_t h = 0; h < f->in_h; h++) {
        if (f->flip)
            for (size_t i = 0; i < own; i++) to[i] = in[i] ^ 0x80u;
        else
            memcpy(to, in, own);
        in += own;
        to += own;
        bf_fill(to, f->zero_in, line - own);
        to += line - own;
    }
    bf_fill(to, f->zero_in,
           line * (size_t)(f->padded_h - f->top - f->in_h) - before + 64u);
}

BF_INLINE int32_t bf_bytes4(const uint8_t *at)
{
    int32_t four;
    memcpy(&four, at, 4);
    return four;
}

/* The mask of bytes of the last quad of a run that are taps. */
BF_INLINE int32_t bf_last_ones(const bf_fast_conv *f)
{
    return (int32_t)(0x01010101u >> (8 * ((4 - f->length % 4) % 4)));
}

BF_VNNI BF_INLINE void bf_finish_vnni(const bf_fast_conv *f, const bf_lanes *lanes, __m512i sum,
                                      __m512i total, uint8_t *out, __mmask16 valid)
{
    if (f->scaled)
        sum = _mm512_add_epi32(
            _mm512_mullo_epi32(sum, _mm512_loadu_si512(lanes->factor)),
            _mm512_mullo_epi32(total, _mm512_loadu_si512(lanes->addend)));
    sum = _mm512_add_epi32(sum, _mm512_loadu_si512(lanes->correction));
    const __m512i multiplier = _mm512_loadu_si512(lanes->multiplier);
    __m512i even = _mm512_mul_epi32(sum, multiplier);
    __m512i odd = _mm512_mul_epi32(_mm512_srli_epi64(sum, 32), _mm512_srli_epi64(multiplier, 32));
    even = _mm512_add_epi64(even, _mm512_loadu_si512(lanes->offset[0]));
    odd = _mm512_add_epi64(odd, _mm512_loadu_si512(lanes->offset[1]));
    even = _mm512_srav_epi64(even, _mm512_loadu_si512(lanes->shift[0]));
    odd = _mm512_srav_epi64(odd, _mm512_loadu_si512(lanes->shift[1]));
    const __m512i low = _mm512_set1_epi64(f->low - f->zero);
    const __m512i high = _mm512_set1_epi64(f->high - f->zero);
    even = _mm512_min_epi64(_mm512_max_epi64(even, low), high);
    odd = _mm512_min_epi64(_mm512_max_epi64(odd, low), high);
    const __m512i both = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
    const __m512i codes = _mm512_add_epi32(both, _mm512_set1_epi32(f->zero));
    if (f->is_long)
        _mm512_mask_storeu_epi32(out, valid, codes);
    else
        _mm_mask_storeu_epi8(out, valid, _mm512_cvtepi32_epi8(codes));
}

/* POSITIONS output positions x BUNDLES of 16 channels in registers. */
#define BF_TILE(POSITIONS, BUNDLES)                                                                \
    BF_VNNI BF_INLINE void bf_tile_##POSITIONS##_##BUNDLES(                                        \
        const bf_fast_conv *f, const uint8_t *const *in, const uint8_t *weights, size_t pitch,     \
        uint8_t *const *out, int32_t n, const __mmask16 *valid, const int scaled)                  \
    {                                                                                              \
        __m512i sum[POSITIONS][BUNDLES], total[POSITIONS];                                         \
        const int32_t quads = bf_quads(f);                                                         \
        const uint8_t *taps = weights;                                                             \
        _Pragma("GCC unroll 16") for (int p = 0; p < POSITIONS; p++)                               \
        {                                                                                          \
            total[p] = _mm512_setzero_si512();                                                     \
            _Pragma("GCC unroll 16") for (int b = 0; b < BUNDLES; b++) sum[p][b] =                 \
                _mm512_setzero_si512();                                                            \
        }                                                                                          \
        for (int32_t run = 0; run < f->runs; run++) {                                              \
            const int32_t first = bf_run_at(f, run);                                               \
            for (int32_t q = 0; q < quads; q++, taps += 64) {                                      \
                __m512i w[BUNDLES];                                                                \
                _Pragma("GCC unroll 16") for (int b = 0; b < BUNDLES; b++) w[b] =                  \
                    _mm512_loadu_si512(taps + (size_t)b * pitch);                                  \
                const __m512i ones = _mm512_set1_epi32(                                            \
                    scaled && q + 1 == quads ? bf_last_ones(f) : 0x01010101);                      \
                _Pragma("GCC unroll 16") for (int p = 0; p < POSITIONS; p++)                       \
                {                                                                                  \
                    const __m512i x = _mm512_set1_epi32(bf_bytes4(in[p] + first + 4 * q));         \
                    if (scaled) total[p] = _mm512_dpbusd_epi32(total[p], x, ones);                 \
                    _Pragma("GCC unroll 16") for (int b = 0; b < BUNDLES; b++) sum[p][b] =         \
                        _mm512_dpbusd_epi32(sum[p][b], x, w[b]);                                   \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        const size_t lanes = (size_t)(f->runs * quads) * 64u;                                      \
        const size_t wide = f->is_long ? 64 : 16;                                          \
        _Pragma("GCC unroll 16") for (int p = 0; p < POSITIONS; p++)                               \
        {                                                                                          \
            if (p < n) {                                                                           \
                _Pragma("GCC unroll 16") for (int b = 0; b < BUNDLES; b++) bf_finish_vnni(         \
                    f,                                                                             \
                    (const bf_lanes *)(const void *)(weights + (size_t)b * pitch + lanes),         \
                    sum[p][b], total[p], out[p] + (size_t)b * wide, valid[b]);                     \
            }                                                                                      \
        }                                                                                          \
    }

BF_TILE(1, 4)
BF_TILE(6, 4)
BF_TILE(8, 2)
BF_TILE(12, 1)

BF_INLINE uint8_t *bf_out_at(const bf_fast_conv *f, uint8_t *out, int32_t position, int32_t channel)
{
    const size_t at = (size_t)position * (size_t)f->out_channels + (size_t)channel;
    return out + (f->is_long ? 4 : 1) * at;
}

BF_INLINE const uint8_t *bf_in_at(const bf_fast_conv *f, const uint8_t *in, int32_t position,
                                  int32_t group)
{
    const int32_t h = position / f->out_w * f->stride_h, w = position % f->out_w * f->stride_w;
    return in + (size_t)(h * f->padded_w + w) * (size_t)f->channels +
           (size_t)(group * (f->channels / f->groups));
}

#include "bitfront_avx2.h"

#define BF_LOOP(POSITIONS, BUNDLES)                                                                \
    for (int32_t at = 0; at < positions; at += POSITIONS) {                                        \
        const uint8_t *from[POSITIONS];                                                            \
        uint8_t *to[POSITIONS];                                                                    \
        const int32_t n = positions - at;                                                          \
        for (int p = 0; p < POSITIONS; p++) {                                                      \
            const int32_t position = p < n ? at + p : positions - 1;                               \
            from[p] = bf_in_at(f, in, position, g);                                                \
            to[p] = bf_out_at(f, out, position, g * per_group + first);                            \
        }                                                                                          \
        if (f->scaled)                                                                             \
            bf_tile_##POSITIONS##_##BUNDLES(f, from, weights, pitch, to, n, valid, 1);             \
        else                                                                                       \
            bf_tile_##POSITIONS##_##BUNDLES(f, from, weights, pitch, to, n, valid, 0);             \
    }

BF_VNNI static void bf_conv_vnni(const bf_fast_conv *f, const uint8_t *in, uint8_t *out,
                                 const uint8_t *weights)
{
    const int32_t per_group = f->out_channels / f->groups, positions = f->out_h * f->out_w;
    const size_t pitch = bf_group_bytes(f);
    for (int32_t g = 0; g < f->groups; g++) {
        int32_t first = 0;
        while (first < per_group) {
            const int32_t left = (per_group - first + BF_LANES - 1) / BF_LANES;
            const int32_t bundles = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            __mmask16 valid[4];
            for (int b = 0; b < 4; b++) {
                const int32_t n = per_group - first - b * BF_LANES;
                valid[b] = (__mmask16)(n >= BF_LANES ? 0xFFFF : n > 0 ? (1u << n) - 1u : 0u);
            }
            if (bundles == 4 && positions == 1) {
                BF_LOOP(1, 4)
            } else if (bundles == 4) {
                BF_LOOP(6, 4)
            } else if (bundles == 2) {
                BF_LOOP(8, 2)
            } else {
                BF_LOOP(12, 1)
            }
            weights += pitch * (size_t)bundles;
            first += bundles * BF_LANES;
        }
    }
}

/* A layer: copy with padding where it needs one, then the kernels of this level. */
BF_KERNEL void bf_fast(const bf_conv *c, int level, const void *in, void *out, uint8_t *padded,
                       const uint8_t *weights)
{
    const bf_fast_conv plan = bf_fast_of(c), *f = &plan;
    const uint8_t *from = (const uint8_t *)in;
    if (f->copies) {
        bf_pad(f, from, padded);
        from = padded;
    }
    if (level >= 2)
        bf_conv_vnni(f, from, (uint8_t *)out, weights);
    else
        bf_conv_avx2(f, from, (uint8_t *)out, weights);
}

BF_VNNI BF_INLINE __m512i bf_centred(const void *data, bf_in from, size_t at, __mmask16 valid)
{
    const __m128i bytes = _mm_maskz_loadu_epi8(valid, (const uint8_t *)data + at);
    const __m512i wide =
        from.type == BF_INT8 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    return _mm512_sub_epi32(wide, _mm512_set1_epi32(from.zero));
}

BF_VNNI static void bf_sum_vnni(void *out, bf_out to, int32_t n_sources,
                                   const void *const *sources, const bf_in *from, int32_t n,
                                   const int32_t *multiplier, const int64_t *offset,
                                   const uint8_t *shift)
{
    const __m512i low = _mm512_set1_epi64(to.low - to.zero);
    const __m512i high = _mm512_set1_epi64(to.high - to.zero);
    const __m128i count = _mm_cvtsi32_si128(shift[0]);
    for (int32_t i = 0; i < n; i += BF_LANES) {
        const __mmask16 valid = (__mmask16)(n - i >= BF_LANES ? 0xFFFF : (1u << (n - i)) - 1u);
        __m512i even = _mm512_set1_epi64(offset[0]), odd = even;
        for (int32_t s = 0; s < n_sources; s++) {
            const __m512i x = bf_centred(sources[s], from[s], (size_t)i, valid);
            const __m512i factor = _mm512_set1_epi64(multiplier[s]);
            even = _mm512_add_epi64(even, _mm512_mul_epi32(x, factor));
            odd = _mm512_add_epi64(odd, _mm512_mul_epi32(_mm512_srli_epi64(x, 32), factor));
        }
        even = _mm512_min_epi64(_mm512_max_epi64(_mm512_sra_epi64(even, count), low), high);
        odd = _mm512_min_epi64(_mm512_max_epi64(_mm512_sra_epi64(odd, count), low), high);
        const __m512i both = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
        const __m512i codes = _mm512_add_epi32(both, _mm512_set1_epi32(to.zero));
        _mm_mask_storeu_epi8((uint8_t *)out + i, valid, _mm512_cvtepi32_epi8(codes));
    }
}

/* bf_sum for 8-bit values and one set of constants. */
BF_KERNEL void bf_sum_fast(int level, void *out, bf_out to, int32_t n_sources,
                           const void *const *sources, const bf_in *from, int32_t n,
                           const int32_t *multiplier, const int64_t *offset, const uint8_t *shift)
{
    if (level >= 2)
        bf_sum_vnni(out, to, n_sources, sources, from, n, multiplier, offset, shift);
    else
        bf_sum_avx2(out, to, n_sources, sources, from, n, multiplier, offset, shift);
}

#endif
