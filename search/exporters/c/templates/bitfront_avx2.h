/* The layers of bitfront_x86.h without AVX-512.
 *
 * AVX2's unsigned x signed product saturates at 16 bits. Where the weights of a layer prove that the
 * sums of `depth` bundles of four taps stay below, it is used; else both factors are widened to 16
 * bits first, where products and their pairwise sums fit 32 bits. */
#ifndef BITFRONT_AVX2_H
#define BITFRONT_AVX2_H

/* POSITIONS output positions x BUNDLES of 16 channels, each in two halves. */
#define BF_PAIRS(POSITIONS, BUNDLES)                                                               \
    BF_AVX2 static void bf_pairs_##POSITIONS##_##BUNDLES(                                          \
        const bf_fast_conv *f, const uint8_t *const *in, const uint8_t *taps, size_t pitch,        \
        __m256i (*sums)[BUNDLES][2])                                                               \
    {                                                                                              \
        const int32_t quads = bf_quads(f);                                                         \
        const __m256i ones = _mm256_set1_epi16(1);                                                 \
        __m256i sum[POSITIONS][BUNDLES][2];                                                        \
        int32_t left = f->depth;                                                                   \
        BF_EACH(POSITIONS, BUNDLES)                                                                \
        sum[p][b][h] = sums[p][b][h] = _mm256_setzero_si256();                                     \
        for (int32_t run = 0; run < f->runs; run++) {                                              \
            const int32_t first = bf_run_at(f, run);                                               \
            for (int32_t q = 0; q < quads;) {                                                      \
                const int32_t end = quads - q < left ? quads : q + left;                           \
                left -= end - q;                                                                   \
                for (; q < end; q++, taps += 64) {                                                 \
                    BF_EACH(POSITIONS, BUNDLES)                                                    \
                    sum[p][b][h] = _mm256_add_epi16(                                               \
                        sum[p][b][h],                                                              \
                        _mm256_maddubs_epi16(                                                      \
                            _mm256_set1_epi32(bf_bytes4(in[p] + first + 4 * q)),                   \
                            _mm256_loadu_si256((const __m256i *)(const void *)(                    \
                                taps + (size_t)b * pitch + 32 * h))));                             \
                }                                                                                  \
                if (left == 0 || (q == quads && run + 1 == f->runs)) {                             \
                    left = f->depth;                                                               \
                    BF_EACH(POSITIONS, BUNDLES)                                                    \
                    {                                                                              \
                        sums[p][b][h] = _mm256_add_epi32(                                          \
                            sums[p][b][h], _mm256_madd_epi16(sum[p][b][h], ones));                 \
                        sum[p][b][h] = _mm256_setzero_si256();                                     \
                    }                                                                              \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
    }

#define BF_EACH(POSITIONS, BUNDLES)                                                                \
    _Pragma("GCC unroll 4") for (int p = 0; p < POSITIONS; p++)                                    \
        _Pragma("GCC unroll 4") for (int b = 0; b < BUNDLES; b++)                                  \
            _Pragma("GCC unroll 2") for (int h = 0; h < 2; h++)

BF_PAIRS(4, 1)
BF_PAIRS(1, 4)

/* Four positions x 16 channels of any weights. */
BF_AVX2 static void bf_tile_avx2(const bf_fast_conv *f, const uint8_t *const *in,
                                 const uint8_t *weights, __m256i (*sums)[1][2], int32_t *totals)
{
    const int32_t quads = bf_quads(f);
    for (int half = 0; half < 2; half++) {
        __m256i low[4], high[4], total[4];
        const uint8_t *taps = weights + 32 * half;
        for (int p = 0; p < 4; p++) low[p] = high[p] = total[p] = _mm256_setzero_si256();
        for (int32_t run = 0; run < f->runs; run++) {
            const int32_t first = bf_run_at(f, run);
            for (int32_t q = 0; q < quads; q++, taps += 64) {
                const __m256i w0 =
                    _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)taps));
                const __m256i w1 = _mm256_cvtepi8_epi16(
                    _mm_loadu_si128((const __m128i *)(const void *)(taps + 16)));
                const __m256i ones = _mm256_cvtepi8_epi16(
                    _mm_set1_epi32(q + 1 == quads ? bf_last_ones(f) : 0x01010101));
                for (int p = 0; p < 4; p++) {
                    const __m256i x = _mm256_cvtepu8_epi16(
                        _mm_set1_epi32(bf_bytes4(in[p] + first + 4 * q)));
                    low[p] = _mm256_add_epi32(low[p], _mm256_madd_epi16(x, w0));
                    high[p] = _mm256_add_epi32(high[p], _mm256_madd_epi16(x, w1));
                    if (f->scaled && !half)
                        total[p] = _mm256_add_epi32(total[p], _mm256_madd_epi16(x, ones));
                }
            }
        }
        for (int p = 0; p < 4; p++) {
            sums[p][0][half] =
                _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[p], high[p]), 0xD8);
            if (f->scaled && !half) {
                const __m128i two = _mm256_castsi256_si128(total[p]);
                totals[p] = _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
            }
        }
    }
}

/* Arithmetic shift of 64 bits, which AVX2 lacks: unsigned, 2^63 added before and taken off. */
BF_AVX2 BF_INLINE __m256i bf_shifted(__m256i value, __m256i shift)
{
    const __m256i sign = _mm256_set1_epi64x(INT64_MIN);
    return _mm256_sub_epi64(_mm256_srlv_epi64(_mm256_xor_si256(value, sign), shift),
                            _mm256_srlv_epi64(sign, shift));
}

BF_AVX2 BF_INLINE __m256i bf_clamped(__m256i value, __m256i low, __m256i high)
{
    value = _mm256_blendv_epi8(value, low, _mm256_cmpgt_epi64(low, value));
    return _mm256_blendv_epi8(value, high, _mm256_cmpgt_epi64(value, high));
}

BF_AVX2 BF_INLINE __m256i bf_load8(const void *at)
{
    return _mm256_loadu_si256((const __m256i *)at);
}

/* Eight codes of which every other one lies in `even`. */
BF_AVX2 BF_INLINE __m256i bf_joined(__m256i even, __m256i odd, int32_t zero)
{
    return _mm256_add_epi32(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA),
                            _mm256_set1_epi32(zero));
}

/* The lowest byte of the first `n` of eight codes. */
BF_AVX2 BF_INLINE void bf_store_bytes(__m256i codes, uint8_t *out, int32_t n)
{
    const __m256i bytes = _mm256_shuffle_epi8(codes, _mm256_set1_epi32(0x0C080400));
    const int32_t four[2] = {_mm256_extract_epi32(bytes, 0), _mm256_extract_epi32(bytes, 4)};
    if (n == 8)
        memcpy(out, four, 8);
    else
        memcpy(out, four, (size_t)n);
}

/* Codes of eight channels; `n` of them are stored. */
BF_AVX2 static void bf_finish_avx2(const bf_fast_conv *f, const bf_lanes *lanes, int half,
                                   __m256i sum, int32_t total, uint8_t *out, int32_t n)
{
    const int at = 8 * half, pair = 4 * half;
    if (f->scaled)
        sum = _mm256_add_epi32(
            _mm256_mullo_epi32(sum, bf_load8(lanes->factor + at)),
            _mm256_mullo_epi32(_mm256_set1_epi32(total), bf_load8(lanes->addend + at)));
    sum = _mm256_add_epi32(sum, bf_load8(lanes->correction + at));
    const __m256i multiplier = bf_load8(lanes->multiplier + at);
    const __m256i low = _mm256_set1_epi64x(f->low - f->zero);
    const __m256i high = _mm256_set1_epi64x(f->high - f->zero);
    __m256i even = _mm256_mul_epi32(sum, multiplier);
    __m256i odd = _mm256_mul_epi32(_mm256_srli_epi64(sum, 32), _mm256_srli_epi64(multiplier, 32));
    even = _mm256_add_epi64(even, bf_load8(lanes->offset[0] + pair));
    odd = _mm256_add_epi64(odd, bf_load8(lanes->offset[1] + pair));
    even = bf_clamped(bf_shifted(even, bf_load8(lanes->shift[0] + pair)), low, high);
    odd = bf_clamped(bf_shifted(odd, bf_load8(lanes->shift[1] + pair)), low, high);
    const __m256i codes = bf_joined(even, odd, f->zero);
    if (f->is_long) {
        int32_t wide[8];
        _mm256_storeu_si256((__m256i *)(void *)wide, codes);
        memcpy(out, wide, 4 * (size_t)n);
    } else {
        bf_store_bytes(codes, out, n);
    }
}

/* Both halves of 16 channels of one position, as far as the layer has them. */
BF_AVX2 BF_INLINE void bf_both(const bf_fast_conv *f, const uint8_t *weights, const __m256i *sums,
                               int32_t total, uint8_t *out, int32_t n)
{
    const bf_lanes *lanes =
        (const bf_lanes *)(const void *)(weights + (size_t)(f->runs * bf_quads(f)) * 64u);
    bf_finish_avx2(f, lanes, 0, sums[0], total, out, n < 8 ? n : 8);
    if (n > 8)
        bf_finish_avx2(f, lanes, 1, sums[1], total, out + (f->is_long ? 32 : 8), n < 16 ? n - 8 : 8);
}

BF_AVX2 static void bf_conv_avx2(const bf_fast_conv *f, const uint8_t *in, uint8_t *out,
                                 const uint8_t *weights)
{
    const int32_t per_group = f->out_channels / f->groups, positions = f->out_h * f->out_w;
    const size_t pitch = bf_group_bytes(f);
    for (int32_t g = 0; g < f->groups; g++) {
        int32_t first = 0;
        for (; f->depth && positions == 1 && per_group - first > 3 * BF_LANES;
             first += 4 * BF_LANES, weights += 4 * pitch) {
            const uint8_t *from = bf_in_at(f, in, 0, g);
            __m256i sums[1][4][2];
            bf_pairs_1_4(f, &from, weights, pitch, sums);
            for (int b = 0; b < 4; b++)
                bf_both(f, weights + (size_t)b * pitch, sums[0][b], 0,
                        bf_out_at(f, out, 0, g * per_group + first + b * BF_LANES),
                        per_group - first - b * BF_LANES);
        }
        for (; first < per_group; first += BF_LANES, weights += pitch) {
            for (int32_t at = 0; at < positions; at += 4) {
                const uint8_t *from[4];
                __m256i sums[4][1][2];
                int32_t totals[4] = {0, 0, 0, 0};
                for (int p = 0; p < 4; p++)
                    from[p] = bf_in_at(f, in, at + p < positions ? at + p : positions - 1, g);
                if (f->depth)
                    bf_pairs_4_1(f, from, weights, pitch, sums);
                else
                    bf_tile_avx2(f, from, weights, sums, totals);
                for (int p = 0; p < 4 && at + p < positions; p++)
                    bf_both(f, weights, sums[p][0], totals[p],
                            bf_out_at(f, out, at + p, g * per_group + first), per_group - first);
            }
        }
    }
}

/* Eight values less their zero point; fewer where the end is near. */
BF_AVX2 BF_INLINE __m256i bf_centred_avx2(const void *data, bf_in from, int32_t at, int32_t n)
{
    uint8_t bytes[8] = {0};
    if (n - at >= 8)
        memcpy(bytes, (const uint8_t *)data + at, 8);
    else
        memcpy(bytes, (const uint8_t *)data + at, (size_t)(n - at));
    const __m128i eight = _mm_loadl_epi64((const __m128i *)(const void *)bytes);
    const __m256i wide =
        from.type == BF_INT8 ? _mm256_cvtepi8_epi32(eight) : _mm256_cvtepu8_epi32(eight);
    return _mm256_sub_epi32(wide, _mm256_set1_epi32(from.zero));
}

BF_AVX2 static void bf_sum_avx2(void *out, bf_out to, int32_t n_sources,
                                const void *const *sources, const bf_in *from, int32_t n,
                                const int32_t *multiplier, const int64_t *offset,
                                const uint8_t *shift)
{
    const __m256i low = _mm256_set1_epi64x(to.low - to.zero);
    const __m256i high = _mm256_set1_epi64x(to.high - to.zero);
    const __m256i count = _mm256_set1_epi64x(shift[0]);
    for (int32_t i = 0; i < n; i += 8) {
        __m256i even = _mm256_set1_epi64x(offset[0]), odd = even;
        for (int32_t s = 0; s < n_sources; s++) {
            const __m256i x = bf_centred_avx2(sources[s], from[s], i, n);
            const __m256i factor = _mm256_set1_epi64x(multiplier[s]);
            even = _mm256_add_epi64(even, _mm256_mul_epi32(x, factor));
            odd = _mm256_add_epi64(odd, _mm256_mul_epi32(_mm256_srli_epi64(x, 32), factor));
        }
        even = bf_clamped(bf_shifted(even, count), low, high);
        odd = bf_clamped(bf_shifted(odd, count), low, high);
        bf_store_bytes(bf_joined(even, odd, to.zero), (uint8_t *)out + i, n - i < 8 ? n - i : 8);
    }
}

#endif
