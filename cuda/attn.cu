/* attn: paged attention.
 *
 * A context is cut into spans of 128 positions, counted from 0. A span gives a maximum m, a sum l of exponentials and a weighted
 * sum of values; spans are folded in order. So a query's result is the same whether one warp goes through all spans (many
 * queries: prefill) or a warp takes each span and another kernel folds what they made (few queries: decode).
 *
 * A warp has a tile of up to 16 queries, tokens of one sequence × the query heads that share a key/value head, so that keys and
 * values are loaded once for all of them, straight into the places where the tensor cores want them: sums do not care in which
 * order elements of a head, or positions, are taken, as long as both factors agree.
 *
 * Queries and weights are split into two 16-bit halves, whose products are added: 22 bits (f16) or 16 bits (bf16) of each count.
 * Keys and values that are not 16-bit floats themselves (f32, q8_0) are split as well, into bf16; fp8 with its power of two is a bf16.
 * Source: Dao 2023, FlashAttention-2; Milakov and Gimelshein 2018, "Online normalizer calculation for softmax".
 * SPDX-License-Identifier: Apache-2.0 */
#include "core/model/dtype.h"
#include "cuda/mma.h"

namespace {

constexpr unsigned QUERIES = 16, SPAN = PL_CUDA_SPAN, MAX_WARPS = 4, MAX_DIM = 256;
constexpr unsigned PAGE_TILES = PL_CUDA_PAGE / 8 /* of 8 positions */, SPAN_TILES = SPAN / 8, SPAN_STEPS = SPAN / 16, SPAN_PAGES = SPAN / PL_CUDA_PAGE;

struct job {
    pl_cuda_mat out, q;
    pl_cuda_kv kv;
    uint32_t layer;
    float scale;
    const uint32_t *pos, *page_start, *pages;
    const pl_cuda_attn_tile *tiles;
    uint32_t n_tiles, per_kv, n_spans;
    __nv_bfloat16 *narrow; /* instead of out; NULL = out */
    float *partial; /* [n_tiles][G][n_spans][queries of a tile](m, l, D values) */
    uint32_t rows;  /* queries of a tile */
    uint32_t shared; /* bytes that a block may have */
};

template <int TYPE> struct kv_type {
    static constexpr bool wide = TYPE == PL_F32 || TYPE == PL_Q8_0; /* split in two */
    static constexpr bool bf16 = wide || TYPE == PL_BF16 || TYPE == PL_F8;
};

/* ---- halves ---------------------------------------------------------------------------------------------------------- */

template <bool BF16> __device__ __forceinline__ uint32_t to_half(float x)
{
    return BF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

template <bool BF16> __device__ __forceinline__ float from_half(uint32_t bits)
{
    return BF16 ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

/* Two numbers as a word of high halves and one of what is left */
template <bool BF16> __device__ __forceinline__ void split(float x, float y, uint32_t &high, uint32_t &low)
{
    const uint32_t hx = to_half<BF16>(x), hy = to_half<BF16>(y);
    high = hx | hy << 16;
    low = to_half<BF16>(__fsub_rn(x, from_half<BF16>(hx))) | to_half<BF16>(__fsub_rn(y, from_half<BF16>(hy))) << 16;
}

/* ---- eight elements of a key or value -------------------------------------------------------------------------------- */

template <int TYPE> struct eight {
    uint32_t high[4], low[kv_type<TYPE>::wide ? 4 : 1]; /* two elements to a word */
};

/* head: a head's share of a page; at: the offset of keys or values in it, and scales of theirs; d: a multiple of 8 below D */
template <int TYPE>
__device__ __forceinline__ eight<TYPE> load_eight(const uint8_t *head, uint32_t at, uint32_t scales, uint32_t position, uint32_t D, uint32_t d)
{
    eight<TYPE> e;
    if constexpr (TYPE == PL_F8) {
        const uint2 v = *reinterpret_cast<const uint2 *>(head + at + position * D + d);
        const uint32_t scale = head[scales + position];
        const float up = scale == 255 ? nanf("") : __uint_as_float((scale + 8) << 23); /* e4m3 as half floats are 2^-8 of what they mean */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t bits[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const uint32_t code = (i < 2 ? v.x : v.y) >> (i % 2 * 16 + k * 8);
                bits[k] = __float_as_uint(__fmul_rn(__half2float(__ushort_as_half(static_cast<unsigned short>((code & 0x80) << 8 | (code & 0x7f) << 7))), up));
            }
            e.high[i] = __byte_perm(bits[0], bits[1], 0x7632);
        }
    } else if constexpr (!kv_type<TYPE>::wide) {
        const uint4 v = *reinterpret_cast<const uint4 *>(head + at + (position * D + d) * 2);
        e.high[0] = v.x, e.high[1] = v.y, e.high[2] = v.z, e.high[3] = v.w;
    } else {
        float x[8];
        if constexpr (TYPE == PL_F32) {
            const float4 *from = reinterpret_cast<const float4 *>(head + at + (position * D + d) * 4);
            const float4 a = from[0], b = from[1];
            x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
        } else {
            const uint2 v = *reinterpret_cast<const uint2 *>(head + at + position * D + d);
            const unsigned short bits = reinterpret_cast<const unsigned short *>(head + scales)[position * ((D + 31) / 32) + d / 32];
            const float scale = __half2float(__ushort_as_half(bits));
#pragma unroll
            for (int i = 0; i < 8; i++)
                x[i] = __fmul_rn(scale, static_cast<float>(static_cast<int8_t>((i < 4 ? v.x : v.y) >> i % 4 * 8)));
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            split<true>(x[2 * i], x[2 * i + 1], e.high[i], e.low[i]);
    }
    return e;
}

template <int TYPE> __device__ __forceinline__ bool finite(const eight<TYPE> &e)
{
    const uint32_t ones = kv_type<TYPE>::bf16 ? 0x7f80 : 0x7c00;
    bool yes = true;
#pragma unroll
    for (int i = 0; i < 4; i++)
        yes = yes && (e.high[i] & ones) != ones && (e.high[i] >> 16 & ones) != ones;
    return yes;
}

/* Element j of two positions */
__device__ __forceinline__ uint32_t pair_of(const uint32_t *a, const uint32_t *b, int j)
{
    return __byte_perm(a[j / 2], b[j / 2], j % 2 ? 0x7632 : 0x5410);
}

/* c += a · b, where a has two halves and b one or two: what both lows would give is below what counts. */
template <int TYPE>
__device__ __forceinline__ void multiply(float *c, const uint32_t *a_high, const uint32_t *a_low, const uint32_t *b_high, const uint32_t *b_low)
{
    mma_half<kv_type<TYPE>::bf16>(c, a_high, b_high);
    mma_half<kv_type<TYPE>::bf16>(c, a_low, b_high);
    if (kv_type<TYPE>::wide)
        mma_half<kv_type<TYPE>::bf16>(c, a_high, b_low);
}

/* ---- a tile ---------------------------------------------------------------------------------------------------------- */

/* What a lane knows of its tile. It has queries g and g + 8, lane = 4 g + t. */
struct tile {
    uint32_t token, n_queries, limit; /* limit: positions that its last token sees */
    uint32_t head, g, t;
    uint32_t end[2];                  /* positions that each of the lane's queries sees; 0 = no such query */
    float factor[2];                  /* of its scores */
    const uint32_t *pages;
    uint32_t page;                    /* of the span's pages, one in each of the first lanes */
    uint4 *scores; /* shared: this lane's, WARP apart */
    uint32_t *q;   /* shared: high halves [QUERIES][pitch], then low ones */
    uint32_t pitch;
};

/* Rows of halves lie so that eight lanes that load 16 bytes of two rows meet different banks. */
__host__ __device__ __forceinline__ uint32_t pitch_of(uint32_t D)
{
    const uint32_t chunks = (D + 31) / 32;
    return chunks * 16 + (chunks % 2 ? 0 : 16);
}

/* A warp's shared memory, in words: scores, then weights (four for each lane and 8 positions), and behind them the queries */
constexpr unsigned SCORES = SPAN_TILES * WARP * 4;
__host__ __device__ __forceinline__ uint32_t shared_words(uint32_t D)
{
    return SCORES + 2 * QUERIES * pitch_of(D);
}

__device__ __forceinline__ uint32_t token_of(const tile &it, const job &j, uint32_t query)
{
    return it.token + query / j.per_kv;
}

__device__ __forceinline__ size_t column_of(const tile &it, const job &j, uint32_t query)
{
    return static_cast<size_t>(it.head * j.per_kv + query % j.per_kv) * j.kv.head_dim;
}

/* Writes the queries' halves to shared memory, each row divided by the power of two that makes its largest element 1 … 2. Several rows are on
 * their way at once: one after the other would cost as many times the memory's latency. */
template <bool BF16> __device__ __forceinline__ void put_queries(tile &it, const job &j)
{
    constexpr unsigned ROWS = 4, EACH = MAX_DIM / WARP;
    unsigned short *q = reinterpret_cast<unsigned short *>(it.q);
    const unsigned lane = threadIdx.x % WARP, D = j.kv.head_dim, padded = (D + 31) / 32 * 32;
#pragma unroll 1
    for (uint32_t first = 0; first < QUERIES; first += ROWS) {
        float x[ROWS][EACH], down[ROWS];
#pragma unroll
        for (unsigned r = 0; r < ROWS; r++) {
            const bool there = first + r < it.n_queries;
            const float *from = j.q.p + token_of(it, j, there ? first + r : 0) * j.q.stride + column_of(it, j, there ? first + r : 0) + lane;
#pragma unroll
            for (unsigned i = 0; i < EACH; i++)
                x[r][i] = there && i * WARP + lane < D ? from[i * WARP] : 0.f;
        }
#pragma unroll
        for (unsigned r = 0; r < ROWS; r++) {
            float most = 0;
#pragma unroll
            for (unsigned i = 0; i < EACH; i++)
                most = fmaxf(most, fabsf(x[r][i]));
            most = warp_max(most);
            const int exponent = most >= 1e-30f && most <= 1e30f ? static_cast<int>(__float_as_uint(most) >> 23) - 127 : 0;
            const float up = __uint_as_float(static_cast<unsigned>(127 + exponent) << 23);
            down[r] = __uint_as_float(static_cast<unsigned>(127 - exponent) << 23);
            if (first + r == it.g)
                it.factor[0] = __fmul_rn(j.scale, up);
            if (first + r == it.g + 8)
                it.factor[1] = __fmul_rn(j.scale, up);
        }
#pragma unroll
        for (unsigned r = 0; r < ROWS; r++)
#pragma unroll
            for (unsigned i = 0; i < EACH; i++) {
                const unsigned d = i * WARP + lane;
                uint32_t high, low;
                if (d >= padded)
                    break;
                split<BF16>(__fmul_rn(x[r][i], down[r]), 0.f, high, low);
                q[(first + r) * it.pitch * 2 + d] = static_cast<unsigned short>(high);
                q[(QUERIES + first + r) * it.pitch * 2 + d] = static_cast<unsigned short>(low);
            }
    }
    __syncwarp();
}

__device__ __forceinline__ tile open_tile(const job &j, uint32_t number, uint32_t head, uint32_t *shared)
{
    const pl_cuda_attn_tile from = j.tiles[number];
    const unsigned lane = threadIdx.x % WARP;
    tile it = {};
    it.token = from.token;
    it.n_queries = from.n_tokens * j.per_kv;
    it.limit = j.pos[from.token + from.n_tokens - 1] + 1;
    it.head = head;
    it.g = lane / 4, it.t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++)
        it.end[i] = it.g + 8 * i < it.n_queries ? j.pos[token_of(it, j, it.g + 8 * i)] + 1 : 0;
    it.pages = j.pages + j.page_start[from.seq];
    it.scores = reinterpret_cast<uint4 *>(shared) + lane;
    it.q = shared + SCORES;
    it.pitch = pitch_of(j.kv.head_dim);
    return it;
}

/* Learns which pages a span has: asked for one by one, each would cost the memory's latency before its keys and values can be asked for. */
__device__ __forceinline__ void enter_span(tile &it, uint32_t span)
{
    const uint32_t position = span * SPAN + threadIdx.x % SPAN_PAGES * PL_CUDA_PAGE;
    it.page = position < it.limit ? it.pages[position / PL_CUDA_PAGE] : 0;
}

/* This head's share of the page that has a position of the span. For all lanes at once. */
__device__ __forceinline__ const uint8_t *page_of(const tile &it, const job &j, uint32_t position)
{
    const uint32_t page = __shfl_sync(ALL_LANES, it.page, static_cast<int>(position / PL_CUDA_PAGE % SPAN_PAGES));
    return j.kv.data + j.layer * j.kv.layer_bytes + page * j.kv.page_bytes + static_cast<size_t>(it.head) * j.kv.head_bytes;
}

/* What a span gives, for the lane's two queries */
struct softmax {
    float max[2], sum[2];
};

/* A part of the keys of a page: elements d … d + 7 of positions 8 i + g. Nothing is read behind the context or the head. */
template <int TYPE> struct page_keys {
    eight<TYPE> k[PAGE_TILES];
};

template <int TYPE> __device__ __forceinline__ page_keys<TYPE> load_page(const tile &it, const job &j, uint32_t first, uint32_t d)
{
    page_keys<TYPE> k = {};
    if (first >= it.limit)
        return k;
    const uint8_t *head = page_of(it, j, first);
    if (d >= j.kv.head_dim)
        return k;
#pragma unroll
    for (unsigned i = 0; i < PAGE_TILES; i++)
        if (first + i * 8 + it.g < it.limit)
            k.k[i] = load_eight<TYPE>(head, 0, j.kv.key_scales, i * 8 + it.g, j.kv.head_dim, d);
    return k;
}

/* Of PAGES pages at once: what a warp has under way while it multiplies the part before. */
template <int TYPE, unsigned PAGES> struct keys {
    page_keys<TYPE> page[PAGES];

    __device__ __forceinline__ void load(const tile &it, const job &j, uint32_t first, uint32_t d)
    {
#pragma unroll
        for (unsigned p = 0; p < PAGES; p++)
            page[p] = load_page<TYPE>(it, j, first + p * PL_CUDA_PAGE, d);
    }
};

/* A part of the queries g and g + 8, as the tensor cores take them */
struct query_part {
    uint32_t high[2][4], low[2][4];
};

__device__ __forceinline__ query_part load_queries(const tile &it, uint32_t d)
{
    uint4 rows[4]; /* high halves of queries g and g + 8, low halves */
#pragma unroll
    for (unsigned i = 0; i < 4; i++)
        rows[i] = *reinterpret_cast<const uint4 *>(it.q + (i / 2 * QUERIES + i % 2 * 8 + it.g) * it.pitch + d / 2);
    return {{{rows[0].x, rows[1].x, rows[0].y, rows[1].y}, {rows[0].z, rows[1].z, rows[0].w, rows[1].w}},
            {{rows[2].x, rows[3].x, rows[2].y, rows[3].y}, {rows[2].z, rows[3].z, rows[2].w, rows[3].w}}};
}

/* c[i][e] += the part's products, for query g + e / 2 * 8 and position 8 i + 2 t + e % 2 of the page */
template <int TYPE> __device__ __forceinline__ void multiply_keys(float (*c)[4], const query_part &q, const page_keys<TYPE> &k)
{
#pragma unroll
    for (unsigned i = 0; i < PAGE_TILES * 2; i++) {
        const eight<TYPE> &e = k.k[i / 2];
        multiply<TYPE>(c[i / 2], q.high[i % 2], q.low[i % 2], e.high + 2 * (i % 2), e.low + (kv_type<TYPE>::wide ? 2 * (i % 2) : 0));
    }
}

/* Puts the span's scores into shared memory; the next part is loaded while one is multiplied. ahead: the first part. */
template <int TYPE, unsigned PAGES> __device__ __forceinline__ void scores(const tile &it, const job &j, uint32_t span, keys<TYPE, PAGES> ahead)
{
    const uint32_t chunks = (j.kv.head_dim + 31) / 32, parts = SPAN_PAGES / PAGES * chunks;
    float c[PAGES][PAGE_TILES][4];
#pragma unroll 1
    for (uint32_t part = 0, chunk = 0, page = 0; part < parts; part++) {
        const query_part q = load_queries(it, chunk * 32 + 8 * it.t);
        const uint32_t this_page = page;
        const bool first = chunk == 0, last = ++chunk == chunks;
        if (last)
            chunk = 0, page += PAGES;
#pragma unroll
        for (unsigned p = 0; p < PAGES; p++) {
            const page_keys<TYPE> k = ahead.page[p];
            if (part + 1 < parts)
                ahead.page[p] = load_page<TYPE>(it, j, span * SPAN + (page + p) * PL_CUDA_PAGE, chunk * 32 + 8 * it.t);
#pragma unroll
            for (unsigned i = 0; first && i < PAGE_TILES * 4; i++)
                c[p][i / 4][i % 4] = 0;
            multiply_keys<TYPE>(c[p], q, k);
        }
#pragma unroll
        for (unsigned i = 0; last && i < PAGES * PAGE_TILES; i++) {
            const float *const v = c[i / PAGE_TILES][i % PAGE_TILES];
            it.scores[(this_page * PAGE_TILES + i) * WARP] =
                make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
        }
    }
}

/* The lane's scores of 8 positions; -infinity where its query does not look */
__device__ __forceinline__ void scores_at(float *p, const tile &it, uint32_t span, unsigned i)
{
    const uint4 v = it.scores[i * WARP];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (unsigned e = 0; e < 4; e++)
        p[e] = span * SPAN + i * 8 + 2 * it.t + e % 2 < it.end[e / 2] ? __fmul_rn(__uint_as_float(words[e]), it.factor[e / 2]) : -INFINITY;
}

/* Makes weights of scores: exponentials of what they are below the span's maximum, in halves, as the tensor cores take them: words
 * 2 step and 2 step + 1 are the high and low halves of 16 positions. */
template <bool BF16> __device__ __forceinline__ softmax weigh(const tile &it, uint32_t span)
{
    softmax s = {{-INFINITY, -INFINITY}, {0, 0}};
    float p[8];
#pragma unroll 4
    for (unsigned i = 0; i < SPAN_TILES; i++) {
        scores_at(p, it, span, i);
#pragma unroll
        for (unsigned e = 0; e < 4; e++)
            s.max[e / 2] = fmaxf(s.max[e / 2], p[e]);
    }
#pragma unroll
    for (unsigned i = 0; i < 4; i++)
        s.max[i / 2] = fmaxf(s.max[i / 2], __shfl_xor_sync(ALL_LANES, s.max[i / 2], 1 + i % 2));
#pragma unroll 2
    for (unsigned step = 0; step < SPAN_STEPS; step++) {
        uint32_t high[4], low[4];
        scores_at(p, it, span, 2 * step);
        scores_at(p + 4, it, span, 2 * step + 1);
#pragma unroll
        for (unsigned e = 0; e < 8; e++) {
            const unsigned h = e % 4 / 2;
            p[e] = span * SPAN + step * 16 + e / 4 * 8 + 2 * it.t + e % 2 < it.end[h] ? expf(__fsub_rn(p[e], s.max[h])) : 0.f;
            s.sum[h] = __fadd_rn(s.sum[h], p[e]);
        }
#pragma unroll
        for (unsigned i = 0; i < 4; i++)
            split<BF16>(p[2 * i], p[2 * i + 1], high[i], low[i]);
        it.scores[2 * step * WARP] = make_uint4(high[0], high[1], high[2], high[3]);
        it.scores[(2 * step + 1) * WARP] = make_uint4(low[0], low[1], low[2], low[3]);
    }
#pragma unroll
    for (unsigned i = 0; i < 4; i++)
        s.sum[i / 2] = __fadd_rn(s.sum[i / 2], __shfl_xor_sync(ALL_LANES, s.sum[i / 2], 1 + i % 2));
    return s;
}

/* The tile's queries do not all see the whole span. What is not a number at a position that some of them see must not reach the
 * others by a weight of 0: it counts as 0 here, and the queries that see it become NaN. */
__device__ __forceinline__ bool is_mixed(const tile &it, const job &j, uint32_t span)
{
    return it.n_queries > j.per_kv && j.pos[it.token] + 1 < min(it.limit, (span + 1) * SPAN);
}

/* Elements 64 chunk + 8 g … of values at 16 positions: those of the lane are 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. */
template <int TYPE> struct vectors {
    eight<TYPE> v[4];
};

template <int TYPE>
__device__ __forceinline__ vectors<TYPE> load_vectors(const tile &it, const job &j, uint32_t first, uint32_t d, bool mixed, uint32_t &bad)
{
    vectors<TYPE> v = {};
    if (first >= it.limit)
        return v;
    const uint8_t *head = page_of(it, j, first);
    if (d >= j.kv.head_dim)
        return v;
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
        const uint32_t position = first + i / 2 * 8 + 2 * it.t + i % 2;
        if (position < it.limit)
            v.v[i] = load_eight<TYPE>(head, j.kv.values, j.kv.value_scales, position % PL_CUDA_PAGE, j.kv.head_dim, d);
        if (mixed && !finite<TYPE>(v.v[i])) {
            v.v[i] = {};
            bad = min(bad, position);
        }
    }
    return v;
}

/* c[i][e]: weighted sum of elements 64 chunk + 16 t + 8 (e % 2) + i for query g + e / 2 * 8. STEPS times 16 positions are under way while those
 * before are multiplied. */
template <int TYPE, unsigned STEPS>
__device__ __forceinline__ void values(float (*c)[4], const tile &it, const job &j, uint32_t span, uint32_t chunk, bool mixed)
{
    const uint32_t d = chunk * 64 + it.g * 8;
    uint32_t bad = 0xffffffffu; /* the first position whose value is not finite */
    vectors<TYPE> ahead[STEPS];
#pragma unroll
    for (unsigned i = 0; i < STEPS; i++)
        ahead[i] = load_vectors<TYPE>(it, j, span * SPAN + i * 16, d, mixed, bad);
#pragma unroll
    for (unsigned i = 0; i < 32; i++)
        c[i / 4][i % 4] = 0;
#pragma unroll 1
    for (unsigned first = 0; first < SPAN_STEPS; first += STEPS) {
#pragma unroll
        for (unsigned s = 0; s < STEPS; s++) {
            const unsigned step = first + s;
            const vectors<TYPE> v = ahead[s];
            if (step + STEPS < SPAN_STEPS)
                ahead[s] = load_vectors<TYPE>(it, j, span * SPAN + (step + STEPS) * 16, d, mixed, bad);
            const uint4 high = it.scores[2 * step * WARP], low = it.scores[(2 * step + 1) * WARP];
            const uint32_t w_high[4] = {high.x, high.y, high.z, high.w}, w_low[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32_t v_high[2] = {pair_of(v.v[0].high, v.v[1].high, i), pair_of(v.v[2].high, v.v[3].high, i)};
                uint32_t v_low[2] = {};
                if (kv_type<TYPE>::wide)
                    v_low[0] = pair_of(v.v[0].low, v.v[1].low, i), v_low[1] = pair_of(v.v[2].low, v.v[3].low, i);
                multiply<TYPE>(c[i], w_high, w_low, v_high, v_low);
            }
        }
    }
    if (!mixed)
        return;
    for (int by = 1; by < WARP; by *= 2)
        bad = min(bad, __shfl_xor_sync(ALL_LANES, bad, by));
#pragma unroll
    for (unsigned i = 0; i < 32; i++)
        if (it.end[i % 4 / 2] > bad)
            c[i / 4][i % 4] = nanf("");
}

/* ---- folding --------------------------------------------------------------------------------------------------------- */

struct fold {
    float old_scale, new_scale;
};

/* Takes a span's maximum and sum into those of the spans before it. */
__device__ __forceinline__ fold fold_in(float &max, float &sum, float span_max, float span_sum)
{
    const float most = fmaxf(max, span_max);
    const fold f = {expf(__fsub_rn(max, most)), expf(__fsub_rn(span_max, most))};
    sum = fmaf(span_sum, f.new_scale, __fmul_rn(sum, f.old_scale));
    max = most;
    return f;
}

__device__ __forceinline__ float fold_value(const fold &f, float total, float span)
{
    return fmaf(span, f.new_scale, __fmul_rn(total, f.old_scale));
}

__device__ __forceinline__ float finish(float total, float sum)
{
    return __fmul_rn(total, __fdiv_rn(1.f, sum));
}

__device__ __forceinline__ void write(const job &j, uint32_t token, size_t column, float v)
{
    if (j.narrow != nullptr)
        j.narrow[static_cast<size_t>(token) * j.out.cols + column] = __float2bfloat16_rn(v);
    else
        j.out.p[token * j.out.stride + column] = v;
}

/* ---- many queries: a warp goes through all spans of its tile --------------------------------------------------------- */

/* CHUNKS: of 64 elements of a head. The warps of a block go through the spans together, so that what one loads the others find
 * in the cache. */
template <int TYPE, unsigned CHUNKS> __global__ void __launch_bounds__(MAX_WARPS *WARP) whole(job j)
{
    wait_for_earlier();
    SHARED_DYNAMIC(uint32_t, shared);
    SHARED uint32_t limits[MAX_WARPS];
    const uint32_t warps = blockDim.x / WARP, warp = threadIdx.x / WARP, number = blockIdx.x * warps + warp;
    const bool mine = number < j.n_tiles;
    tile it = open_tile(j, mine ? number : j.n_tiles - 1, blockIdx.y, shared + warp * shared_words(j.kv.head_dim));
    put_queries<kv_type<TYPE>::bf16>(it, j);
    uint32_t longest = 0;
    limits[warp] = it.limit;
    __syncthreads();
    for (unsigned i = 0; i < warps; i++)
        longest = ::max(longest, limits[i]);
    float max[2] = {}, sum[2] = {}, total[CHUNKS][8][4] = {};
    for (uint32_t span = 0; span * SPAN < longest; span++) {
        __syncthreads();
        if (span * SPAN >= it.limit)
            continue;
        enter_span(it, span);
        keys<TYPE, 1> first;
        first.load(it, j, span * SPAN, 8 * it.t);
        scores<TYPE, 1>(it, j, span, first);
        const softmax s = weigh<kv_type<TYPE>::bf16>(it, span);
        fold f[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            f[h] = {0, 1};
            if (span == 0)
                max[h] = s.max[h], sum[h] = s.sum[h];
            else if (span * SPAN < it.end[h])
                f[h] = fold_in(max[h], sum[h], s.max[h], s.sum[h]);
        }
        const bool mixed = is_mixed(it, j, span);
#pragma unroll
        for (unsigned chunk = 0; chunk < CHUNKS; chunk++) {
            float c[8][4];
            if (chunk * 64 >= j.kv.head_dim)
                break;
            values<TYPE, 1>(c, it, j, span, chunk, mixed);
#pragma unroll
            for (int i = 0; i < 32; i++) {
                float &to = total[chunk][i / 4][i % 4];
                if (span == 0)
                    to = c[i / 4][i % 4];
                else if (span * SPAN < it.end[i % 4 / 2])
                    to = fold_value(f[i % 4 / 2], to, c[i / 4][i % 4]);
            }
        }
    }
#pragma unroll
    for (unsigned i = 0; i < CHUNKS * 32; i++) {
        const unsigned chunk = i / 32, e = i % 32 / 8, k = i % 8, h = e / 2;
        const uint32_t d = chunk * 64 + 16 * it.t + e % 2 * 8 + k, query = it.g + 8 * h;
        if (mine && d < j.kv.head_dim && query < it.n_queries)
            write(j, token_of(it, j, query), column_of(it, j, query) + d, finish(total[chunk][k][e], sum[h]));
    }
}

/* ---- few queries: a warp for each span, then one that folds ------------------------------------------------------------ */

__device__ __forceinline__ float *partial_of(const job &j, uint32_t number, uint32_t head, uint32_t span, uint32_t query)
{
    const size_t at = (static_cast<size_t>(number) * j.kv.n_kv_heads + head) * j.n_spans + span;
    return j.partial + (at * j.rows + query) * (j.kv.head_dim + 2);
}

/* Parts that a warp has under way: it is mostly alone, and waits for memory. What is split in two takes twice the registers. */
template <int TYPE> constexpr unsigned ahead = kv_type<TYPE>::wide ? 2 : 4;

template <int TYPE> __global__ void __launch_bounds__(WARP) one_span(job j)
{
    wait_for_earlier();
    SHARED_DYNAMIC(uint32_t, shared);
    const uint32_t number = blockIdx.x, head = blockIdx.y, span = blockIdx.z, D = j.kv.head_dim;
    const pl_cuda_attn_tile from = j.tiles[number];
    if (span * SPAN > j.pos[from.token + from.n_tokens - 1])
        return;
    tile it = open_tile(j, number, head, shared);
    enter_span(it, span);
    keys<TYPE, ahead<TYPE>> first;
    first.load(it, j, span * SPAN, 8 * it.t);
    put_queries<kv_type<TYPE>::bf16>(it, j);
    scores<TYPE, ahead<TYPE>>(it, j, span, first);
    const softmax s = weigh<kv_type<TYPE>::bf16>(it, span);
    const bool mixed = is_mixed(it, j, span);
    for (uint32_t chunk = 0; chunk * 64 < D; chunk++) {
        float c[8][4];
        values<TYPE, ahead<TYPE>>(c, it, j, span, chunk, mixed);
#pragma unroll
        for (unsigned i = 0; i < 32; i++) {
            const unsigned e = i / 8, k = i % 8;
            const uint32_t d = chunk * 64 + 16 * it.t + e % 2 * 8 + k, query = it.g + e / 2 * 8;
            if (d < D && query < it.n_queries)
                partial_of(j, number, head, span, query)[2 + d] = c[k][e];
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (it.t == 0 && it.g + 8 * h < it.n_queries) {
            float *to = partial_of(j, number, head, span, it.g + 8 * h);
            to[0] = s.max[h], to[1] = s.sum[h];
        }
}

/* A block for each query. Several spans' numbers are on their way at once; they are folded one after the other. */
__global__ void join(job j)
{
    wait_for_earlier();
    constexpr uint32_t ROUND = 8;
    const uint32_t number = blockIdx.x, head = blockIdx.y, query = blockIdx.z, D = j.kv.head_dim, d = threadIdx.x;
    const pl_cuda_attn_tile from = j.tiles[number];
    if (query >= from.n_tokens * j.per_kv || d >= D)
        return;
    const uint32_t token = from.token + query / j.per_kv, n = j.pos[token] / SPAN + 1;
    const float *p = partial_of(j, number, head, 0, query);
    const size_t stride = static_cast<size_t>(j.rows) * (D + 2);
    float max = p[0], sum = p[1], total = p[2 + d];
    for (uint32_t first = 1; first < n; first += ROUND) {
        float span_max[ROUND], span_sum[ROUND], value[ROUND];
#pragma unroll
        for (uint32_t i = 0; i < ROUND; i++) {
            const float *const at = p + min(first + i, n - 1) * stride;
            span_max[i] = at[0], span_sum[i] = at[1], value[i] = at[2 + d];
        }
#pragma unroll
        for (uint32_t i = 0; i < ROUND; i++)
            if (first + i < n)
                total = fold_value(fold_in(max, sum, span_max[i], span_sum[i]), total, value[i]);
    }
    write(j, token, (static_cast<size_t>(head) * j.per_kv + query % j.per_kv) * D + d, finish(total, sum));
}

/* ---- the rotation of Q8_0 -------------------------------------------------------------------------------------------- */

/* Multiplies pieces of 2^bits elements of each head by the Hadamard matrix of that size, over the root of the size. A warp for a head. */
__global__ void rotate_heads(pl_cuda_mat out, pl_cuda_mat x, uint32_t head_dim, uint32_t bits)
{
    wait_for_earlier();
    SHARED float heads[MAX_WARPS][MAX_DIM];
    const unsigned lane = threadIdx.x % WARP, per_row = x.cols / head_dim;
    const uint32_t i = blockIdx.x * MAX_WARPS + threadIdx.x / WARP;
    float *h = heads[threadIdx.x / WARP];
    if (i >= x.rows * per_row)
        return;
    const size_t column = static_cast<size_t>(i % per_row) * head_dim;
    for (unsigned d = lane; d < head_dim; d += WARP)
        h[d] = x.p[i / per_row * x.stride + column + d];
    __syncwarp();
    for (unsigned distance = 1; distance < 1u << bits; distance *= 2) {
        for (unsigned k = lane; k < head_dim / 2; k += WARP) {
            const unsigned first = k / distance * 2 * distance + k % distance;
            const float a = h[first], b = h[first + distance];
            h[first] = __fadd_rn(a, b);
            h[first + distance] = __fsub_rn(a, b);
        }
        __syncwarp();
    }
    const float scale = __fdiv_rn(1.f, sqrtf(static_cast<float>(1u << bits)));
    for (unsigned d = lane; d < head_dim; d += WARP)
        out.p[i / per_row * out.stride + column + d] = __fmul_rn(h[d], scale);
}

cudaError_t rotate(cudaStream_t s, pl_cuda_mat out, pl_cuda_mat x, const pl_cuda_kv &kv)
{
    LAUNCH(rotate_heads, dim3(pieces(static_cast<size_t>(x.rows) * (x.cols / kv.head_dim), MAX_WARPS)), dim3(MAX_WARPS * WARP), 0, s, out, x, kv.head_dim,
           kv.rotate_bits);
    return cudaGetLastError();
}

/* ---- launching --------------------------------------------------------------------------------------------------------- */

/* As many warps to a block as have room */
template <int TYPE, unsigned CHUNKS> cudaError_t run_whole(cudaStream_t s, const job &j)
{
    const uint32_t one = shared_words(j.kv.head_dim) * sizeof(uint32_t), fit = (j.shared - 1024) / one, warps = fit < MAX_WARPS ? fit : MAX_WARPS;
    const cudaError_t e = cudaFuncSetAttribute(whole<TYPE, CHUNKS>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(warps * one));
    if (e != cudaSuccess)
        return e;
    LAUNCH((whole<TYPE, CHUNKS>), dim3(pieces(j.n_tiles, warps), j.kv.n_kv_heads), dim3(warps * WARP), warps * one, s, j);
    return cudaGetLastError();
}

template <int TYPE> cudaError_t run_spans(cudaStream_t s, const job &j)
{
    const size_t shared = shared_words(j.kv.head_dim) * sizeof(uint32_t);
    LAUNCH((one_span<TYPE>), dim3(j.n_tiles, j.kv.n_kv_heads, j.n_spans), dim3(WARP), shared, s, j);
    const cudaError_t e = cudaGetLastError();
    if (e != cudaSuccess)
        return e;
    LAUNCH(join, dim3(j.n_tiles, j.kv.n_kv_heads, j.rows), dim3((j.kv.head_dim + WARP - 1) / WARP * WARP), 0, s, j);
    return cudaGetLastError();
}

template <int TYPE> cudaError_t run_type(cudaStream_t s, const job &j)
{
    const uint32_t D = j.kv.head_dim;
    if (j.partial != nullptr)
        return run_spans<TYPE>(s, j);
    return D <= 64 ? run_whole<TYPE, 1>(s, j) : D <= 128 ? run_whole<TYPE, 2>(s, j) : run_whole<TYPE, 4>(s, j);
}

cudaError_t run(cudaStream_t s, const job &j)
{
    switch (j.kv.dtype) {
    case PL_F32: return run_type<PL_F32>(s, j);
    case PL_F16: return run_type<PL_F16>(s, j);
    case PL_BF16: return run_type<PL_BF16>(s, j);
    case PL_Q8_0: return run_type<PL_Q8_0>(s, j);
    case PL_F8: return run_type<PL_F8>(s, j);
    default: return cudaErrorInvalidValue;
    }
}

} // namespace

cudaError_t pl_cuda_attn(cudaStream_t s, pl_cuda_mat out, pl_cuda_mat q, pl_cuda_kv kv, uint32_t layer, float scale, pl_cuda_batch b,
                         pl_cuda_attn_plan plan)
{
    job j = {};
    j.out = out, j.q = q, j.kv = kv, j.layer = layer, j.scale = scale;
    j.pos = b.pos, j.page_start = b.page_start, j.pages = b.pages;
    j.tiles = plan.tiles, j.n_tiles = plan.n_tiles, j.n_spans = plan.n_spans, j.partial = plan.partial, j.shared = plan.shared;
    j.narrow = static_cast<__nv_bfloat16 *>(plan.narrow);
    j.per_kv = q.cols / kv.head_dim / kv.n_kv_heads;
    j.rows = QUERIES / j.per_kv * j.per_kv;
    if (kv.rotate_bits == 0)
        return run(s, j);
    j.q = {plan.rotated, q.rows, q.cols, q.cols};
    cudaError_t e = rotate(s, j.q, q, kv);
    if (e == cudaSuccess)
        e = run(s, j);
    return e == cudaSuccess ? rotate(s, out, out, kv) : e;
}
