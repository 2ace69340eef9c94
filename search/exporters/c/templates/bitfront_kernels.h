/* Portable integer kernels of networks exported by bitfront. C99; of libc only memcpy.
 *
 * Arithmetic is that of REQUANTIZATION.md: every operation ends in
 *     q = clamp(((a * M + O) >> n) + z, low, high)
 * with an arithmetic shift and sums that are proven to fit int64. */
#ifndef BITFRONT_KERNELS_H
#define BITFRONT_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* One copy of each kernel, whatever is known at its calls; not every network needs all of them. */
#if defined(__clang__)
#define BF_KERNEL static __attribute__((noinline, unused))
#elif defined(__GNUC__)
#define BF_KERNEL static __attribute__((noinline, noclone, unused))
#else
#define BF_KERNEL static inline
#endif

enum { BF_UINT8, BF_INT8, BF_UINT16, BF_INT16, BF_INT32 };
enum { BF_TERNARY = 9 };
#define BF_HOLE INT32_MIN

/* Rows of one width: weight = factor * code + addend. */
typedef struct {
    int32_t kind; /* 0: all weights are 0; 1..8 bits; BF_TERNARY: five to a byte */
    int32_t rows, factor, addend, row_bytes, offset;
} bf_block;

/* Sizes are depth, height, width. */
typedef struct {
    int32_t in_type, out_type, in_zero, zero, low, high;
    int32_t in[3], out[3], kernel[3], stride[3], pad[3], dilation[3], spread[3];
    int32_t channels, out_channels, groups, n_blocks, n_shared;
    int32_t wide;   /* sums of 64 bits */
    int32_t scaled; /* some weights do not fit 8 bits */
    int32_t depth;  /* products of four taps of one channel whose pairs can be summed in 16 bits */
} bf_conv;

typedef struct {
    const uint8_t *data;
    const bf_block *blocks;
    const int16_t *addends;  /* per row, or NULL: the block's */
    const uint16_t *order;   /* output channel of each row, or NULL: the row's number */
    const int32_t *multiplier; /* these three per row, or one each if n_shared is 1 */
    const int64_t *offset;
    const uint8_t *shift;
} bf_rows;

/* Filled in by statements: a constant with addresses in it would be static memory. */
static inline bf_rows bf_rows_of(const uint8_t *data, const bf_block *blocks,
                                 const int16_t *addends, const uint16_t *order,
                                 const int32_t *multiplier, const int64_t *offset,
                                 const uint8_t *shift)
{
    bf_rows rows;
    rows.data = data;
    rows.blocks = blocks;
    rows.addends = addends;
    rows.order = order;
    rows.multiplier = multiplier;
    rows.offset = offset;
    rows.shift = shift;
    return rows;
}

typedef struct {
    int32_t type, zero;
} bf_in;

typedef struct {
    int32_t type, zero, low, high;
} bf_out;

static inline size_t bf_size(int32_t type)
{
    return type == BF_INT32 ? 4 : type >= BF_UINT16 ? 2 : 1;
}

static inline int32_t bf_load(const void *data, int32_t type, size_t at)
{
    switch (type) {
    case BF_UINT8: return ((const uint8_t *)data)[at];
    case BF_INT8: return ((const int8_t *)data)[at];
    case BF_UINT16: return ((const uint16_t *)data)[at];
    case BF_INT16: return ((const int16_t *)data)[at];
    default: return ((const int32_t *)data)[at];
    }
}

static inline void bf_store(void *data, int32_t type, size_t at, int32_t value)
{
    switch (type) {
    case BF_UINT8: ((uint8_t *)data)[at] = (uint8_t)value; break;
    case BF_INT8: ((int8_t *)data)[at] = (int8_t)value; break;
    case BF_UINT16: ((uint16_t *)data)[at] = (uint16_t)value; break;
    case BF_INT16: ((int16_t *)data)[at] = (int16_t)value; break;
    default: ((int32_t *)data)[at] = value; break;
    }
}

/* The shift of a negative number is written out, since C leaves it to the compiler. */
static inline int32_t bf_rescale(int64_t total, int32_t shift, int32_t zero, int32_t low,
                                 int32_t high)
{
    int64_t code = (total < 0 ? ~(~total >> shift) : total >> shift) + zero;
    return (int32_t)(code < low ? low : code > high ? high : code);
}

/* Input: nearest code of x / scale, halves to even; the value lies as inner x outer there. */
BF_KERNEL void bf_quantize(void *out, bf_out to, const float *x, float scale, int32_t outer,
                               int32_t inner)
{
    const float least = (float)(to.low - to.zero), most = (float)(to.high - to.zero);
    for (int32_t o = 0; o < outer; o++) {
        for (int32_t i = 0; i < inner; i++) {
            float steps = x[(size_t)o * (size_t)inner + (size_t)i] / scale;
            steps = steps > least ? steps : least;
            steps = steps < most ? steps : most;
            int32_t whole = (int32_t)steps;
            const float rest = steps - (float)whole;
            if (rest > 0.5f || (rest == 0.5f && (whole & 1))) whole++;
            if (rest < -0.5f || (rest == -0.5f && (whole & 1))) whole--;
            bf_store(out, to.type, (size_t)i * (size_t)outer + (size_t)o, whole + to.zero);
        }
    }
}

/* One row of n weights from its packed codes. */
BF_KERNEL void bf_decode(int16_t *row, int32_t n, const uint8_t *data, int32_t kind,
                             int32_t factor, int32_t addend)
{
    if (kind == BF_TERNARY) {
        int32_t trits = 0;
        for (int32_t i = 0; i < n; i++) {
            if (i % 5 == 0) trits = *data++;
            row[i] = (int16_t)(factor * (trits % 3) + addend);
            trits /= 3;
        }
        return;
    }
    const uint32_t mask = (1u << kind) - 1u;
    uint32_t bits = 0;
    int32_t held = 0;
    for (int32_t i = 0; i < n; i++) {
        if (held < kind) {
            bits |= (uint32_t)*data++ << held;
            held += 8;
        }
        row[i] = (int16_t)(factor * (int32_t)(bits & mask) + addend);
        bits >>= kind;
        held -= kind;
    }
}

static inline int32_t bf_dot(const void *data, int32_t type, size_t at, const int16_t *row,
                             int32_t n, int32_t zero)
{
    int32_t sum = 0;
    if (type == BF_UINT8) {
        const uint8_t *x = (const uint8_t *)data + at;
        for (int32_t i = 0; i < n; i++) sum += row[i] * (int16_t)(x[i] - zero); /* a product of */
    } else if (type == BF_INT8) {
        const int8_t *x = (const int8_t *)data + at;
        for (int32_t i = 0; i < n; i++) sum += row[i] * (int16_t)(x[i] - zero); /* 16 bits */
    } else {
        for (int32_t i = 0; i < n; i++)
            sum += row[i] * (bf_load(data, type, at + (size_t)i) - zero);
    }
    return sum;
}

static inline int64_t bf_dot_long(const void *data, int32_t type, size_t at, const int16_t *row,
                                  int32_t n, int32_t zero)
{
    int64_t sum = 0;
    for (int32_t i = 0; i < n; i++)
        sum += (int64_t)row[i] * (bf_load(data, type, at + (size_t)i) - zero);
    return sum;
}

/* Position in the source of tap k of output position o along one axis, -1 for padding. */
static inline int32_t bf_place(const bf_conv *c, int axis, int32_t o, int32_t k)
{
    int32_t at = o * c->stride[axis] + k * c->dilation[axis] - c->pad[axis];
    if (at < 0 || at > (c->in[axis] - 1) * c->spread[axis]) return -1;
    if (c->spread[axis] == 1) return at;
    return at % c->spread[axis] ? -1 : at / c->spread[axis];
}

/* The accumulator of one output position and channel; taps that fall into padding add nothing. */
static inline int64_t bf_window(const bf_conv *c, const void *in, const int16_t *row, int32_t d,
                                int32_t h, int32_t w, int32_t first_channel)
{
    const int32_t per_group = c->channels / c->groups;
    int64_t sum = 0;
    for (int32_t kd = 0; kd < c->kernel[0]; kd++) {
        const int32_t z = bf_place(c, 0, d, kd);
        if (z < 0) continue;
        for (int32_t kh = 0; kh < c->kernel[1]; kh++) {
            const int32_t y = bf_place(c, 1, h, kh);
            if (y < 0) continue;
            const int16_t *taps =
                row + (size_t)((kd * c->kernel[1] + kh) * c->kernel[2]) * (size_t)per_group;
            const size_t line = ((size_t)z * (size_t)c->in[1] + (size_t)y) * (size_t)c->in[2];
            int32_t kw = 0;
            while (kw < c->kernel[2]) {
                const int32_t x = bf_place(c, 2, w, kw);
                int32_t run = 1;
                if (x < 0) {
                    kw++;
                    continue;
                }
                if (c->groups == 1 && c->dilation[2] == 1 && c->spread[2] == 1) {
                    const int32_t right = c->in[2] - x, left = c->kernel[2] - kw;
                    run = left < right ? left : right; /* neighbours lie side by side */
                }
                const size_t at =
                    (line + (size_t)x) * (size_t)c->channels + (size_t)first_channel;
                const int16_t *weights = taps + (size_t)kw * (size_t)per_group;
                if (c->wide)
                    sum += bf_dot_long(in, c->in_type, at, weights, run * per_group, c->in_zero);
                else
                    sum += bf_dot(in, c->in_type, at, weights, run * per_group, c->in_zero);
                kw += run;
            }
        }
    }
    return sum;
}

/* Convolution or linear layer, one output channel after the other; `row` holds its weights. */
BF_KERNEL void bf_convolve(const bf_conv *c, const bf_rows *rows, const void *in, void *out,
                               int16_t *row)
{
    const int32_t per_group = c->channels / c->groups, n_out = c->out_channels;
    const int32_t n = c->kernel[0] * c->kernel[1] * c->kernel[2] * per_group;
    int32_t number = 0;
    for (int32_t b = 0; b < c->n_blocks; b++) {
        const bf_block *block = &rows->blocks[b];
        for (int32_t r = 0; r < block->rows; r++, number++) {
            const int32_t channel = rows->order ? rows->order[number] : number;
            const int32_t first = channel / (n_out / c->groups) * per_group;
            const int32_t set = c->n_shared == 1 ? 0 : number;
            const int32_t addend = rows->addends ? rows->addends[number] : block->addend;
            if (block->kind)
                bf_decode(row, n, rows->data + block->offset + (size_t)r * (size_t)block->row_bytes,
                          block->kind, block->factor, addend);
            size_t at = (size_t)channel;
            for (int32_t d = 0; d < c->out[0]; d++)
                for (int32_t h = 0; h < c->out[1]; h++)
                    for (int32_t w = 0; w < c->out[2]; w++, at += (size_t)n_out) {
                        int64_t sum = 0;
                        if (block->kind) sum = bf_window(c, in, row, d, h, w, first);
                        sum = sum * rows->multiplier[set] + rows->offset[set];
                        bf_store(out, c->out_type, at,
                                 bf_rescale(sum, rows->shift[set], c->zero, c->low, c->high));
                    }
        }
    }
}

/* Rescaled sum of up to four values; `inner` elements in a row share one of `sets` constants. */
BF_KERNEL void bf_sum(void *out, bf_out to, int32_t n_sources, const void *const *sources,
                          const bf_in *from, int32_t n, int32_t inner, int32_t sets,
                          const int32_t *multiplier, const int64_t *offset, const uint8_t *shift)
{
    for (int32_t i = 0; i < n; i++) {
        const int32_t set = i / inner % sets;
        int64_t total = offset[set];
        for (int32_t s = 0; s < n_sources; s++)
            total += (int64_t)(bf_load(sources[s], from[s].type, (size_t)i) - from[s].zero) *
                     multiplier[s * sets + set];
        bf_store(out, to.type, (size_t)i,
                 bf_rescale(total, shift[set], to.zero, to.low, to.high));
    }
}

BF_KERNEL void bf_product(void *out, bf_out to, const void *a, bf_in from_a, const void *b,
                              bf_in from_b, int32_t n, int32_t multiplier, int64_t offset,
                              int32_t shift)
{
    for (int32_t i = 0; i < n; i++) {
        const int64_t left = bf_load(a, from_a.type, (size_t)i) - from_a.zero;
        const int64_t right = bf_load(b, from_b.type, (size_t)i) - from_b.zero;
        bf_store(out, to.type, (size_t)i,
                 bf_rescale(left * right * multiplier + offset, shift, to.zero, to.low, to.high));
    }
}

/* One source of a concatenation, rescaled into its place. */
BF_KERNEL void bf_part(void *out, bf_out to, const void *in, bf_in from, int32_t outer,
                           int32_t inner, int32_t pitch, int32_t first, int32_t multiplier,
                           int64_t offset, int32_t shift)
{
    for (int32_t o = 0; o < outer; o++)
        for (int32_t i = 0; i < inner; i++) {
            const int64_t x =
                bf_load(in, from.type, (size_t)o * (size_t)inner + (size_t)i) - from.zero;
            bf_store(out, to.type, (size_t)first + (size_t)o * (size_t)pitch + (size_t)i,
                     bf_rescale(x * multiplier + offset, shift, to.zero, to.low, to.high));
        }
}

enum { BF_POOL_SUM, BF_POOL_MAX, BF_POOL_MIN };

typedef struct {
    int32_t kind, in[4], out[4], step[4];
    int32_t table[4]; /* where an axis's starts and ends lie in the tables, -1: none */
} bf_pool;

static inline int32_t bf_edge(const bf_pool *p, const int32_t *tables, int axis, int32_t o,
                              int32_t end)
{
    if (p->table[axis] < 0) return o + end;
    return tables[p->table[axis] + end * p->out[axis] + o];
}

static inline int64_t bf_pool_window(const bf_pool *p, const int32_t *tables, const void *in,
                                     bf_in from, const int32_t *o)
{
    int32_t a[4], b[4];
    int64_t found = 0;
    int first = 1;
    for (int axis = 0; axis < 4; axis++) {
        a[axis] = bf_edge(p, tables, axis, o[axis], 0);
        b[axis] = bf_edge(p, tables, axis, o[axis], 1);
    }
    for (int32_t i = a[0]; i < b[0]; i += p->step[0])
        for (int32_t j = a[1]; j < b[1]; j += p->step[1])
            for (int32_t k = a[2]; k < b[2]; k += p->step[2]) {
                const size_t line =
                    (((size_t)i * (size_t)p->in[1] + (size_t)j) * (size_t)p->in[2] + (size_t)k) *
                    (size_t)p->in[3];
                for (int32_t l = a[3]; l < b[3]; l += p->step[3]) {
                    const int32_t x = bf_load(in, from.type, line + (size_t)l);
                    if (p->kind == BF_POOL_SUM)
                        found += x - from.zero;
                    else if (first || (p->kind == BF_POOL_MAX ? x > found : x < found))
                        found = x;
                    first = 0;
                }
            }
    return found;
}

/* Sum (rescaled), maximum or minimum over windows of a value of four axes. */
BF_KERNEL void bf_pools(const bf_pool *p, const int32_t *tables, const void *in, bf_in from,
                            void *out, bf_out to, int32_t sets, const int32_t *multiplier,
                            const int64_t *offset, const uint8_t *shift)
{
    size_t at = 0;
    int32_t o[4], place = 0;
    for (o[0] = 0; o[0] < p->out[0]; o[0]++)
        for (o[1] = 0; o[1] < p->out[1]; o[1]++)
            for (o[2] = 0; o[2] < p->out[2]; o[2]++, place++)
                for (o[3] = 0; o[3] < p->out[3]; o[3]++, at++) {
                    const int64_t found = bf_pool_window(p, tables, in, from, o);
                    int32_t code = (int32_t)found;
                    if (p->kind == BF_POOL_SUM) {
                        const int32_t set = sets == 1 ? 0 : place;
                        code = bf_rescale(found * multiplier[set] + offset[set], shift[set],
                                          to.zero, to.low, to.high);
                    }
                    bf_store(out, to.type, at, code);
                }
}

BF_KERNEL void bf_relu(void *out, const void *in, bf_in from, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        const int32_t x = bf_load(in, from.type, (size_t)i);
        bf_store(out, from.type, (size_t)i, x > from.zero ? x : from.zero);
    }
}

/* axes: count, stride, position of the table or -1; outermost first. Holes hold the zero point. */
BF_KERNEL void bf_copy(void *out, const void *in, bf_in from, int32_t start, int32_t n_axes,
                           const int32_t *axes, const int32_t *tables)
{
    const size_t size = bf_size(from.type);
    const int32_t *last = axes + 3 * (n_axes - 1);
    int32_t index[16] = {0};
    size_t at = 0;
    for (;;) {
        int64_t base = start;
        int hole = 0;
        for (int32_t a = 0; a + 1 < n_axes; a++) {
            const int32_t *axis = axes + 3 * a;
            const int32_t step =
                axis[2] < 0 ? index[a] * axis[1] : tables[axis[2] + index[a]];
            if (step == BF_HOLE)
                hole = 1;
            else
                base += step;
        }
        if (!hole && last[2] < 0 && last[1] == 1) {
            memcpy((uint8_t *)out + at * size, (const uint8_t *)in + (size_t)base * size,
                   (size_t)last[0] * size);
            at += (size_t)last[0];
        } else {
            for (int32_t i = 0; i < last[0]; i++, at++) {
                const int32_t step = last[2] < 0 ? i * last[1] : tables[last[2] + i];
                int32_t code = from.zero;
                if (!hole && step != BF_HOLE) code = bf_load(in, from.type, (size_t)(base + step));
                bf_store(out, from.type, at, code);
            }
        }
        int32_t a = n_axes - 2;
        while (a >= 0 && ++index[a] == axes[3 * a]) index[a--] = 0;
        if (a < 0) return;
    }
}

#endif
