/* sample: from rows of logits to tokens and log-probabilities: a block for a row.
 *
 * core/device/draw.h defines what comes out, bit for bit: weights are computed and added in the order of core/sample/scan_loops.h,
 * in pieces of 256 values by a warp each, and what decides between tokens beyond that are whole numbers, which may be added in any order.
 * SPDX-License-Identifier: Apache-2.0 */
#include "cuda/launch.h"

namespace {

constexpr unsigned THREADS = 1024, WARPS = THREADS / WARP, PIECE = 256, LANES = 16, BINS = 256;
constexpr uint32_t NONE = 0xffffffffu;

using amount = unsigned long long;

struct best {
    float value;
    uint32_t at;
};

/* The larger; of equal ones the first */
__device__ __forceinline__ best better(const best &a, const best &b)
{
    return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a;
}

/* Every thread gets the best of all; scratch is free again after the next barrier. */
__device__ best block_best(best b, best *scratch)
{
    for (int i = WARP / 2; i > 0; i /= 2)
        b = better(b, best{__shfl_xor_sync(ALL_LANES, b.value, i), __shfl_xor_sync(ALL_LANES, b.at, i)});
    __syncthreads();
    if (threadIdx.x % WARP == 0)
        scratch[threadIdx.x / WARP] = b;
    __syncthreads();
    for (unsigned i = 0; i < WARPS; i++)
        b = better(b, scratch[i]);
    return b;
}

/* The largest value; infinity where one is not a number */
__device__ best find_max(const float *x, uint32_t V, best *scratch)
{
    best b = {-INFINITY, NONE};
    for (uint32_t i = threadIdx.x; i < V; i += THREADS)
        b = better(b, best{isnan(x[i]) ? INFINITY : x[i], i});
    return block_best(b, scratch);
}

/* ---- weights ----------------------------------------------------------------------------------------------------------- */

/* exp(x) for x <= 0, operation by operation as in scan_loops.h */
__device__ __forceinline__ float exp_of(float x)
{
    const float y = x > -87.f ? x : -87.f;
    const float n = __fsub_rn(__fadd_rn(__fmul_rn(y, 1.44269504088896341f), 12582912.f), 12582912.f);
    const float r = __fadd_rn(__fsub_rn(y, __fmul_rn(n, 0.693359375f)), __fmul_rn(n, 2.12194440e-4f));
    float p = 1.9875691500e-4f;
    p = __fadd_rn(__fmul_rn(p, r), 1.3981999507e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 8.3334519073e-3f);
    p = __fadd_rn(__fmul_rn(p, r), 4.1665795894e-2f);
    p = __fadd_rn(__fmul_rn(p, r), 1.6666665459e-1f);
    p = __fadd_rn(__fmul_rn(p, r), 5.0000001201e-1f);
    p = __fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), __fadd_rn(r, 1.f));
    return x < -87.f ? 0.f : __fmul_rn(p, __int_as_float((static_cast<int>(n) + 127) << 23));
}

/* A warp makes weights of x[from .. end), at most PIECE of them; every lane gets their sum. w may be x; null = only the sum. */
__device__ float weigh_piece(const float *x, uint32_t from, uint32_t end, float max, float inverse, float *w)
{
    const unsigned lane = threadIdx.x % WARP;
    float sum[2] = {}; /* of the lanes that scan_loops.h has: 64 values are its four vectors of 16 */
    uint32_t i = from;
    for (; i + 2 * WARP <= end; i += 2 * WARP)
        for (unsigned h = 0; h < 2; h++) {
            const uint32_t at = i + h * WARP + lane;
            const float v = exp_of(__fmul_rn(__fsub_rn(x[at], max), inverse));
            sum[h] = __fadd_rn(sum[h], v);
            if (w != nullptr)
                w[at] = v;
        }
    for (; i < end; i += LANES)
        if (lane < LANES && i + lane < end) {
            const float v = exp_of(__fmul_rn(__fsub_rn(x[i + lane], max), inverse));
            sum[0] = __fadd_rn(sum[0], v);
            if (w != nullptr)
                w[i + lane] = v;
        }
    for (unsigned h = 0; h < 2; h++)
        sum[h] = __fadd_rn(sum[h], __shfl_xor_sync(ALL_LANES, sum[h], LANES));
    const float four = __fadd_rn(sum[0], sum[1]);
    float total = __shfl_sync(ALL_LANES, four, 0);
    for (unsigned k = 1; k < LANES; k++)
        total = __fadd_rn(total, __shfl_sync(ALL_LANES, four, k));
    return total;
}

/* Sums of pieces in shared memory, and of all of them, which every thread gets */
__device__ double weigh(const float *x, uint32_t V, float max, float inverse, float *w, float *sums, double *all)
{
    const uint32_t n = (V + PIECE - 1) / PIECE;
    __syncthreads();
    for (uint32_t i = threadIdx.x / WARP; i < n; i += WARPS) {
        const float sum = weigh_piece(x, i * PIECE, min(V, (i + 1) * PIECE), max, inverse, w);
        if (threadIdx.x % WARP == 0)
            sums[i] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0;
        for (uint32_t i = 0; i < n; i++)
            sum += sums[i];
        *all = sum;
    }
    __syncthreads();
    return *all;
}

/* By one warp; sums are taken one after the other, as the definition has them. piece: room for PIECE values in shared memory. */
__device__ int32_t draw_any(const float *w, uint32_t V, const float *sums, double goal, uint32_t otherwise, float *piece)
{
    const unsigned lane = threadIdx.x % WARP;
    double sum = 0;
    for (uint32_t from = 0; from < V; from += PIECE) {
        const float all = sums[from / PIECE];
        if (!(sum + all > goal)) {
            sum += all;
            continue;
        }
        const uint32_t n = min(V - from, PIECE);
        __syncwarp();
        for (uint32_t i = lane; i < n; i += WARP)
            piece[i] = w[from + i];
        __syncwarp();
        for (uint32_t i = 0; i < n; i++)
            if ((sum += piece[i]) > goal)
                return static_cast<int32_t>(from + i);
    }
    return static_cast<int32_t>(otherwise);
}

/* ---- filters ----------------------------------------------------------------------------------------------------------- */

/* Tokens down to a weight, by its bits, which are ordered as weights are; of those with just that weight the ids up to `last`. */
struct kept {
    uint32_t bits, last;
};

__device__ __forceinline__ bool is_kept(const kept &k, uint32_t bits, uint32_t id)
{
    return bits > k.bits || (bits == k.bits && id <= k.last && bits != 0);
}

__device__ __forceinline__ amount amount_of(float w)
{
    return __float2ull_rz(__fmul_rn(w, PL_DRAW_AMOUNT));
}

/* An amount that many threads add to: shared memory adds 32 bits at once, but 64 only by trying again until nobody else has. */
struct counter {
    uint32_t low, high;

    __device__ __forceinline__ void add(amount a)
    {
        const uint32_t more = static_cast<uint32_t>(a), before = atomicAdd(&low, more);
        atomicAdd(&high, static_cast<uint32_t>(a >> 32) + (before + more < before ? 1u : 0u));
    }
    __device__ __forceinline__ amount all() const
    {
        return static_cast<amount>(high) << 32 | low;
    }
};

struct selection {
    counter amounts[BINS];
    uint32_t counts[BINS];
    amount left; /* of what is wanted, from tokens whose weight begins with the bits in `chosen` */
    uint32_t chosen, equal, last;
    bool all;
};

/* The sum of the lanes before this one; *all: of all */
__device__ __forceinline__ amount sum_before(amount own, amount *all)
{
    const unsigned lane = threadIdx.x % WARP;
    amount sum = own;
    for (unsigned d = 1; d < WARP; d *= 2) {
        const amount other = __shfl_up_sync(ALL_LANES, sum, d);
        sum += lane >= d ? other : 0;
    }
    *all = __shfl_sync(ALL_LANES, sum, WARP - 1);
    return sum - own;
}

/* From the largest weight down until their number, or amount, reaches `left`: one digit of the weight's bits. By one warp. */
__device__ void choose(selection &s, bool by_count, uint32_t shift, uint32_t n_bins)
{
    constexpr unsigned EACH = BINS / WARP;
    const unsigned lane = threadIdx.x % WARP;
    amount of[EACH], own = 0, all;
#pragma unroll
    for (unsigned i = 0; i < EACH; i++) { /* lane 0 has the largest */
        const unsigned d = BINS - 1 - lane * EACH - i;
        of[i] = d >= n_bins ? 0 : by_count ? s.counts[d] : s.amounts[d].all();
        own += of[i];
    }
    const amount left = s.left;
    amount before = sum_before(own, &all);
    __syncwarp();
    if (lane == 0)
        s.all = all < left;
    if (all < left || before >= left || before + own < left)
        return;
#pragma unroll
    for (unsigned i = 0; i < EACH; i++) {
        const unsigned d = BINS - 1 - lane * EACH - i;
        if (before < left && before + of[i] >= left) {
            s.left = left - before;
            s.chosen |= d << shift;
            s.equal = s.counts[d];
        }
        before += of[i];
    }
}

/* The id of the n-th token of that weight: each warp counts in a stretch of the row, and one finds it in its own. */
__device__ void find_nth(const float *w, uint32_t V, const kept &within, uint32_t bits, amount n, selection &s)
{
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const uint32_t stretch = (V + THREADS - 1) / THREADS * WARP, first = warp * stretch, end = min(V, first + stretch);
    uint32_t count = 0;
    for (uint32_t from = first; from < end; from += WARP) {
        const uint32_t i = from + lane;
        count += static_cast<uint32_t>(__popc(__ballot_sync(ALL_LANES, i < end && __float_as_uint(w[i]) == bits && is_kept(within, bits, i))));
    }
    if (lane == 0)
        s.counts[warp] = count;
    __syncthreads();
    for (unsigned i = 0; i < warp; i++)
        n = n > s.counts[i] ? n - s.counts[i] : 0; /* 0: before this warp's */
    for (uint32_t from = first; n > 0 && n <= count; from += WARP) {
        const uint32_t i = from + lane;
        unsigned found = __ballot_sync(ALL_LANES, i < end && __float_as_uint(w[i]) == bits && is_kept(within, bits, i));
        const unsigned here = static_cast<unsigned>(__popc(found));
        count -= here;
        if (here < n) {
            n -= here;
            continue;
        }
        for (; n > 1; n--)
            found &= found - 1;
        if (lane == 0)
            s.last = from + static_cast<uint32_t>(__ffs(static_cast<int>(found))) - 1;
        return;
    }
}

/* The first tokens by rank, of those within, until there are `goal` of them (by_count), or their amounts reach it */
__device__ kept select(const float *w, uint32_t V, const kept &within, bool by_count, amount goal, selection &s)
{
    if (threadIdx.x == 0) {
        s.left = goal > 0 ? goal : 1;
        s.chosen = 0;
        s.all = false;
    }
    for (uint32_t known = 31, shift; known > 0; known = shift) {
        shift = known > 8 ? known - 8 : 0;
        __syncthreads();
        for (unsigned i = threadIdx.x; i < BINS; i += THREADS)
            s.counts[i] = 0, s.amounts[i] = {0, 0};
        __syncthreads();
        const uint32_t chosen = s.chosen, n_bins = 1u << (known - shift), end = s.all ? 0 : V;
        for (uint32_t i = threadIdx.x; i < end; i += THREADS) {
            const uint32_t bits = __float_as_uint(w[i]), digit = bits >> shift & (n_bins - 1);
            if (!is_kept(within, bits, i) || bits >> known != chosen >> known)
                continue;
            atomicAdd(&s.counts[digit], 1u);
            if (!by_count)
                s.amounts[digit].add(amount_of(w[i]));
        }
        __syncthreads();
        if (threadIdx.x < WARP && end > 0)
            choose(s, by_count, shift, n_bins);
    }
    __syncthreads();
    const bool all = s.all;
    const uint32_t bits = s.chosen;
    const amount one = by_count || all ? 1 : amount_of(__uint_as_float(bits)), n = (s.left + one - 1) / one;
    const bool some = !all && n < s.equal;
    if (some)
        find_nth(w, V, within, bits, n, s);
    __syncthreads();
    const uint32_t last = some ? s.last : bits == within.bits ? within.last : NONE;
    __syncthreads();
    return all ? within : kept{bits, last};
}

/* Amounts of kept tokens, piece by piece, in shared memory */
__device__ void add_kept(const float *w, uint32_t V, const kept &k, float min_p, amount *pieces)
{
    const uint32_t n = (V + PIECE - 1) / PIECE;
    __syncthreads();
    for (uint32_t i = threadIdx.x / WARP; i < n; i += WARPS) {
        amount sum = 0;
        for (uint32_t at = i * PIECE + threadIdx.x % WARP; at < min(V, (i + 1) * PIECE); at += WARP)
            if (is_kept(k, __float_as_uint(w[at]), at) && w[at] >= min_p)
                sum += amount_of(w[at]);
        for (int d = WARP / 2; d > 0; d /= 2)
            sum += __shfl_xor_sync(ALL_LANES, sum, d);
        if (threadIdx.x % WARP == 0)
            pieces[i] = sum;
    }
    __syncthreads();
}

/* The sum of all pieces, which every lane gets, and what the lane's own stretch of them has */
__device__ __forceinline__ amount sum_of_pieces(const amount *pieces, uint32_t n, amount *before, amount *own)
{
    const uint32_t each = (n + WARP - 1) / WARP, first = threadIdx.x % WARP * each;
    amount all;
    *own = 0;
    for (uint32_t i = first; i < min(n, first + each); i++)
        *own += pieces[i];
    *before = sum_before(*own, &all);
    return all;
}

/* By one warp: the first id at which the sum of amounts exceeds the goal; the lane whose part of the way has it finds it. */
__device__ int32_t draw_kept(const float *w, uint32_t V, const kept &k, float min_p, const amount *pieces, uint64_t u, uint32_t otherwise)
{
    const uint32_t n = (V + PIECE - 1) / PIECE, each = (n + WARP - 1) / WARP;
    const unsigned lane = threadIdx.x % WARP;
    amount before, own, all;
    const amount goal = __umul64hi(u << 11, sum_of_pieces(pieces, n, &before, &own));
    unsigned found = __ballot_sync(ALL_LANES, before <= goal && before + own > goal);
    if (found == 0)
        return static_cast<int32_t>(otherwise);
    uint32_t piece = lane * each;
    for (; (found >> lane & 1) && before + pieces[piece] <= goal; piece++)
        before += pieces[piece];
    const int from = __ffs(static_cast<int>(found)) - 1;
    piece = __shfl_sync(ALL_LANES, piece, from);
    before = __shfl_sync(ALL_LANES, before, from);
    constexpr uint32_t EACH = PIECE / WARP;
    const uint32_t first = piece * PIECE + lane * EACH;
    amount of[EACH];
    own = 0;
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        const uint32_t at = first + i;
        of[i] = at < V && is_kept(k, __float_as_uint(w[at]), at) && w[at] >= min_p ? amount_of(w[at]) : 0;
        own += of[i];
    }
    before += sum_before(own, &all);
    uint32_t at = first;
    found = __ballot_sync(ALL_LANES, before <= goal && before + own > goal);
#pragma unroll
    for (uint32_t i = 0; i < EACH; i++) {
        before += of[i];
        at += before <= goal;
    }
    return static_cast<int32_t>(__shfl_sync(ALL_LANES, at, __ffs(static_cast<int>(found)) - 1));
}

/* ---- a row ------------------------------------------------------------------------------------------------------------- */

struct shared {
    best bests[WARPS];
    selection selected;
    float piece[PIECE];
    double sum;
    int32_t token;
};

/* The row with its edits, in `work`; the row itself where there are none */
__device__ const float *edit(const float *x, uint32_t V, const pl_draw &d, const pl_edit *edits, float *work)
{
    if (d.add == d.end)
        return x;
    for (uint32_t i = threadIdx.x; i < V; i += THREADS)
        work[i] = x[i];
    __syncthreads();
    for (uint32_t i = d.add + threadIdx.x; i < d.seen; i += THREADS)
        if (static_cast<uint32_t>(edits[i].id) < V)
            work[edits[i].id] = __fadd_rn(work[edits[i].id], edits[i].value);
    __syncthreads();
    for (uint32_t i = d.seen + threadIdx.x; i < d.set; i += THREADS)
        if (static_cast<uint32_t>(edits[i].id) < V) {
            float *const at = work + edits[i].id;
            *at = __fsub_rn(*at > 0 ? __fdiv_rn(*at, d.repetition) : __fmul_rn(*at, d.repetition), edits[i].value);
        }
    __syncthreads();
    for (uint32_t i = d.set + threadIdx.x; i < d.end; i += THREADS)
        if (static_cast<uint32_t>(edits[i].id) < V)
            work[edits[i].id] = edits[i].value;
    __syncthreads();
    return work;
}

/* What is drawn; -1 where the row has no maximum. sums: shared memory for a sum of each piece. */
__device__ int32_t draw(const float *x, uint32_t V, const pl_draw &d, float *work, amount *sums, shared &s)
{
    const best max = find_max(x, V, s.bests);
    if (!isfinite(max.value))
        return -1;
    if (d.inverse == 0)
        return static_cast<int32_t>(max.at);
    float *const floats = reinterpret_cast<float *>(sums);
    const double mass = weigh(x, V, max.value, d.inverse, work, floats, &s.sum);
    const bool any = d.top_k == 0 && d.top_p >= 1 && d.min_p <= 0;
    kept k = {0, NONE};
    if (d.top_k > 0)
        k = select(work, V, k, true, d.top_k, s.selected);
    if (d.top_p < 1) {
        amount goal = static_cast<amount>(mass * static_cast<double>(PL_DRAW_AMOUNT) * d.top_p);
        if (d.top_k > 0) {
            amount before, own;
            add_kept(work, V, k, 0, sums);
            goal = static_cast<amount>(static_cast<double>(sum_of_pieces(sums, (V + PIECE - 1) / PIECE, &before, &own)) * d.top_p);
        }
        k = select(work, V, k, false, goal, s.selected);
    }
    if (!any)
        add_kept(work, V, k, d.min_p, sums);
    if (threadIdx.x < WARP) {
        const int32_t token = any ? draw_any(work, V, floats, static_cast<double>(d.u) * 0x1p-53 * mass, max.at, s.piece)
                                  : draw_kept(work, V, k, d.min_p, sums, d.u, max.at);
        if (threadIdx.x == 0)
            s.token = token;
    }
    __syncthreads();
    return s.token;
}

/* The best of this thread's values that come after one */
__device__ best next_of(const float *x, uint32_t V, const best &after)
{
    best b = {-INFINITY, NONE};
    for (uint32_t i = threadIdx.x; i < V; i += THREADS)
        if (x[i] < after.value || (x[i] == after.value && i > after.at))
            b = better(b, best{x[i], i});
    return b;
}

/* Sums and the largest values; false where the row has no maximum */
__device__ bool log_probabilities(const float *x, uint32_t V, uint32_t n_top, float *sums, shared &s, pl_drawn *out)
{
    const best max = find_max(x, V, s.bests);
    if (!isfinite(max.value))
        return false;
    const double sum = weigh(x, V, max.value, 1, nullptr, sums, &s.sum);
    const uint32_t n = min(n_top, V);
    best mine = next_of(x, V, best{INFINITY, NONE});
    for (uint32_t i = 0; i < n; i++) {
        const best b = block_best(mine, s.bests);
        if (threadIdx.x == 0)
            out->top[i] = {static_cast<int32_t>(b.at), b.value};
        if (b.at % THREADS == threadIdx.x)
            mine = next_of(x, V, b);
    }
    if (threadIdx.x == 0) {
        out->max = max.value;
        out->sum = sum;
        out->n_top = n;
    }
    return true;
}

__global__ void __launch_bounds__(THREADS) sample_kernel(pl_cuda_draws p, uint32_t first)
{
    wait_for_earlier();
    SHARED_DYNAMIC(amount, sums);
    SHARED shared s;
    const uint32_t row = first + blockIdx.x, V = p.logits.cols;
    const float *const x = p.logits.p + row * p.logits.stride;
    float *const work = p.work + static_cast<size_t>(blockIdx.x) * V;
    const pl_draw d = p.draws[row];
    pl_drawn *const out = p.out + row;
    int32_t token = d.given;
    if (token < 0)
        token = draw(edit(x, V, d, p.edits, work), V, d, work, sums, s);
    if (token >= 0 && d.n_top >= 0 && !log_probabilities(x, V, static_cast<uint32_t>(d.n_top), reinterpret_cast<float *>(sums), s, out))
        token = -1;
    if (threadIdx.x == 0) {
        out->token = token;
        out->own = token >= 0 ? x[token] : 0.f;
    }
}

} // namespace

cudaError_t pl_cuda_sample(cudaStream_t s, struct pl_cuda_draws d, uint32_t first, uint32_t n)
{
    LAUNCH(sample_kernel, n, THREADS, pieces(d.logits.cols, PIECE) * sizeof(amount), s, d, first);
    return cudaGetLastError();
}
