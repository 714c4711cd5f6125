#!/usr/bin/env python3
"""Mutation check: plants an error in each kernel family of cuda/, one at a time, and sees whether the operation table on the
emulated device notices; for files whose names begin with "train" the unit suites of training, for recorded steps and ranks theirs. `make mutants`
runs it; each line of the table below is a kernel family, a file, a text that occurs in it exactly once, and what takes its place.

Ends with "N passed, N failed": passed = caught. A mutant that the compiler refuses, or a text that is no longer there, counts as failed.
SPDX-License-Identifier: Apache-2.0
"""
import argparse
import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

MUTANTS = [
    # family, file, text, replacement
    ("norm", "rows.cu", "squares = k < cols - i ?", "squares = k + 1 < cols - i ?"),
    ("norm", "rows.cu", "__fadd_rn(v[k], bias[k])", "__fadd_rn(v[k], bias[k ^ 1])"),
    ("rope", "kv.cu", "halves ? a + n : a + 1", "halves ? a + n - 1 : a + 1"),
    ("rope", "kv.cu", "i < rope.n_dims / 2; i += KV_THREADS", "i + 1 < rope.n_dims / 2; i += KV_THREADS"),
    ("rope: keys", "kv.cu", "k < (j.per_kv + 1) * n;", "k < j.per_kv * n;"),
    ("rope: keys", "kv.cu", "k / n < j.per_kv ? queries + k / n * D : key", "k / n < j.per_kv ? queries + k / n * 2 * n : key"),
    ("rope: queries", "kv.cu", "blockIdx.y) * j.per_kv * D;", "blockIdx.y) * D;"),
    ("rope: no barrier", "kv.cu", "cosines, sines);\n        __syncthreads();", "cosines, sines);"),
    ("rope: no barrier", "kv.cu", "cosines, sines);\n    }\n    __syncthreads();", "cosines, sines);\n    }"),
    ("activation", "rows.cu", "if (i < x.cols)\n        *at", "if (i + 1 < x.cols)\n        *at"),
    ("gated activation", "rows.cu", "load_four<QUADS>(up, in + F, F - i)", "load_four<QUADS>(up, in + F - 4, F - i)"),
    ("gated activation", "rows.cu", "j.plus.p + t * j.plus.stride + i, F", "j.plus.p + t * j.plus.stride + i + 4, F"),
    ("gather", "rows.cu", "x.p[rows[blockIdx.x] * x.stride + i]", "x.p[(rows[blockIdx.x] + 1) * x.stride + i]"),
    ("gather", "rows.cu", "if (i < out.cols)\n        out.p", "if (i <= out.cols)\n        out.p"),
    ("block sum", "launch.h", "lane < n ? scratch[lane]", "lane + 1 < n ? scratch[lane]"),
    ("block sum: no barrier", "launch.h", "scratch[warp] = v;\n    __syncthreads();", "scratch[warp] = v;"),
    ("no wait for what is before", "rows.cu", "static __global__ void norm_kernel(norm_job j)\n{\n    wait_for_earlier();", "static __global__ void norm_kernel(norm_job j)\n{"),
    ("embedding of floats", "embed.cu", "if (i >= out.cols || row == PL_CUDA_NO_ROW", "if (i + 1 >= out.cols || row == PL_CUDA_NO_ROW"),
    ("embedding of blocks", "embed.cu", "e = 0; e < 32; e++", "e = 0; e < 31; e++"),
    ("embedding of blocks", "embed.cu", "type::halves == 2 ? e / 16 : 0", "type::halves == 2 ? (e + 1) / 16 % 2 : 0"),
    ("cache, writing floats", "kv.cu", "i < kv.head_dim; i += KV_THREADS)", "i + 1 < kv.head_dim; i += KV_THREADS)"),
    ("cache, writing floats", "kv.cu", "j.v.p[t * j.v.stride + h * D + i]", "j.v.p[t * j.v.stride + h * D + i - 1]"),
    ("cache, rounding", "kv.cu", "row + i, scales + b)", "row + i, scales + b / 2)"),
    ("cache, rounding", "kv.cu", "k < n; k += KV_THREADS", "k + 2 < n; k += KV_THREADS"),
    ("cache, rounding: no barrier", "kv.cu", "of[i + distance] = a - b;\n        }\n        __syncthreads();", "of[i + distance] = a - b;\n        }"),
    ("cache, fp8", "kv.cu", "+ 0x7ffffu + (bits >> 20 & 1)", "+ 0x80000u"),
    ("cache, fp8", "kv.cu", "> 0x600000u", "> 0x7fffffu"),
    ("cache, fp8", "kv.cu", "kv.value_scales : kv.key_scales) + to.at]", "kv.value_scales : kv.key_scales) + to.at / 2]"),
    ("attention, fp8", "attn.cu", "i % 2 * 16 + k * 8", "i % 2 * 16 + k * 4"),
    ("dense, few rows", "dense.cu", "k < w.cols; k += STEPS * WARP * N", "k + N < w.cols; k += STEPS * WARP * N"),
    ("dense, few rows", "dense.cu", "if (k + s * WARP * N >= cols)", "if (k + (s + 1) * WARP * N >= cols)"),
    ("dense, few rows", "dense.cu", "next.load(rows, k + STEPS * WARP * N, w.cols)", "next.load(rows, k + STEPS * WARP * N, w.cols - N)"),
    ("dense, few rows", "dense.cu", "? total[r] + j.bias[column + first + r]", "? total[r] + j.bias[first + r]"),
    ("dense, few rows", "dense.cu", "j.out.p + (token + t) * j.out.stride", "j.out.p + (token + (t ^ 1)) * j.out.stride"),
    ("products, parts", "parts.h", "block -= blocks, column += p.rows", "block -= blocks, column += p.rows - 1"),
    ("dense, unaligned", "dense.cu", "to[i] = from[i];", "to[i] = from[(i ^ 1) % N];"),
    ("dense, gated", "dense.cu", "total[r], total[r + OUTS])", "total[r], total[OUTS])"),
    ("dense, gated", "dense.cu", "up += j.bias[F + row]", "up += j.bias[F + row - 1]"),
    ("dense, gated", "dense.cu", "up += j.plus.p[t * j.plus.stride + F + row]", "up += j.plus.p[t * j.plus.stride + row]"),
    ("dense, rounding", "dense.cu", "v[k] *= inverse;", "v[k] *= inverse * 1.01f;"),
    ("dense, rounding", "dense.cu", "static_cast<size_t>(t) * x.cols + i, v, x.cols - i", "static_cast<size_t>(t) * x.cols + (i ^ 4), v, x.cols - i"),
    ("dense, rounding", "four.h", "v[i] = i < left ? from[i] : 0;", "v[i] = i + 1 < left ? from[i] : 0;"),
    ("dense, rounding", "four.h", "half_bits(W{}, v[2]) | half_bits(W{}, v[3]) << 16", "half_bits(W{}, v[3]) | half_bits(W{}, v[2]) << 16"),
    ("kept in another form", "rows.cu", "j.narrow + blockIdx.x * static_cast<size_t>(cols) + i", "j.narrow + blockIdx.x * j.out.stride + (i ^ 4)"),
    ("kept in another form", "rows.cu", "j.narrow + t * static_cast<size_t>(F) + i", "j.narrow + t * static_cast<size_t>(F) + (i ^ 4)"),
    ("kept in another form", "attn.cu", "j.narrow[static_cast<size_t>(token) * j.out.cols + column]", "j.narrow[static_cast<size_t>(token) * j.out.cols + (column ^ 1)]"),
    ("kept in another form", "matmul.c", "if (next->parts[i].dtype != PL_BF16)", "if (next->parts[0].dtype != PL_BF16)"),
    ("weights, parts together", "weights.c", "return close ? at :", "return close ? at + 2 :"),
    ("dense, finishing", "dense.cu", "* scale[t]", "* scale[t > 0 ? t - 1 : 0]"),
    ("dense, finishing", "dense.cu", "v += bias[i];", "v += bias[i > 0 ? i - 1 : 0];"),
    ("rounding of activations", "quant.cu", "d < 16; d *= 2)\n        sum", "d < 8; d *= 2)\n        sum"),
    ("rounding of activations", "quant.cu", "__fdiv_rn(max, 127.f)", "__fdiv_rn(max, 128.f)"),
    ("blocks, few rows", "quant.cu", "for (; quad < end; quad++) {", "for (; quad + 1 < end; quad++) {"),
    ("blocks, few rows", "quant.cu", "next.load({from + (quad + 1) * BYTES", "next.load({from + quad * BYTES"),
    ("blocks, few rows", "quant.cu", "- 1 - strand) / PL_PACK_STRANDS)", "- 2 - strand) / PL_PACK_STRANDS)"),
    ("blocks, few rows", "quant.cu", "dot[k / 4 % halves]);\n            sum[i]", "dot[k / 3 % halves]);\n            sum[i]"),
    ("blocks, few rows: no barrier", "quant.cu", "[i] = sum[i];\n    __syncthreads();", "[i] = sum[i];"),
    ("blocks, gated", "quant.cu", "strands[FEW_WARPS + w]", "strands[w]"),
    ("blocks, parts", "quant.cu", "write(p, column + row, t, total, second)", "write(p, row, t, total, second)"),
    ("blocks, parts", "quant.cu", "one.bias = one.bias != nullptr ? one.bias + p.w.part[i].rows", "one.bias = one.bias != nullptr ? one.bias"),
    ("blocks, many rows", "quant.cu", "t = blockIdx.y * TOKENS + n * 8 + lane % 4 * 2 + e % 2", "t = blockIdx.y * TOKENS + n * 8 + lane % 4 * 2 + (e + 1) % 2"),
    ("blocks, many rows", "quant.cu", "load_tile<TYPE>(*s, p, super, half);\n                __syncthreads();", "load_tile<TYPE>(*s, p, super, half);"),
    ("blocks, many rows", "quant.cu", "half < PL_PACK_SUPER / DEPTH", "half + 1 < PL_PACK_SUPER / DEPTH"),
    ("blocks, reading", "blocks.h", "fifth_bits(word_in(s, 8, j), b.q)", "fifth_bits(word_in(s, 8, j ^ 1), b.q)"),
    ("blocks, reading", "blocks.h", "byte_of(v, 8 + j % 4) >> j / 4 * 2", "byte_of(v, 8 + j % 4) >> j / 5 * 2"),
    ("blocks, packing", "pack.c", "i % PL_PACK_STRANDS * PL_PACK_ROWS + row;", "i % PL_PACK_STRANDS * PL_PACK_ROWS + (row ^ 1);"),
    ("attention, scores", "attn.cu", "2 * it.t + e % 2 < it.end[e / 2] ?", "2 * it.t + e % 2 + 1 < it.end[e / 2] ?"),
    ("attention, weights", "attn.cu", "2 * it.t + e % 2 < it.end[h] ? expf", "2 * it.t + e % 2 + 1 < it.end[h] ? expf"),
    ("attention, queries", "attn.cu", "if (first + r == it.g)", "if (first + r == (it.g ^ 1))"),
    ("attention, queries", "attn.cu", "i * WARP + lane < D ? from", "i * WARP + lane + 1 < D ? from"),
    ("attention, pages", "attn.cu", "position / PL_CUDA_PAGE % SPAN_PAGES", "position / PL_CUDA_PAGE % 2"),
    ("attention, keys ahead", "attn.cu", "(page + p) * PL_CUDA_PAGE", "(page + p / 2) * PL_CUDA_PAGE"),
    ("attention, values ahead", "attn.cu", "(step + STEPS) * 16, d", "(first + STEPS) * 16, d"),
    ("attention, whole tiles", "attn.cu", "else if (span * SPAN < it.end[h])", "else if (span * SPAN + 1 < it.end[h])"),
    ("attention, NaN in values", "attn.cu", "if (it.end[i % 4 / 2] > bad)", "if (it.end[i % 4 / 2] >= bad)"),
    ("attention, one span", "attn.cu", "if (d < D && query < it.n_queries)", "if (d + 1 < D && query < it.n_queries)"),
    ("attention, joining", "attn.cu", "if (first + i < n)", "if (first + i + 1 < n)"),
    ("attention, joining", "attn.cu", "static_cast<size_t>(j.rows) * (D + 2);", "static_cast<size_t>(j.rows) * (D + 1);"),
    ("attention, rotation", "attn.cu", "k < head_dim / 2; k += WARP", "k + 1 < head_dim / 2; k += WARP"),
    ("attention, tiles", "attn.c", "b->q_start[s + 1]; t < end", "b->q_start[s + 1]; t + 1 < end"),
    ("attention, spans", "attn.c", "return most / PL_CUDA_SPAN + 1", "return (most + PL_CUDA_SPAN - 1) / PL_CUDA_SPAN"),
    ("adapters, down", "lora.cu", "k < p.cols; k += WARP", "k + WARP < p.cols; k += WARP"),
    ("adapters, down", "lora.cu", "if (at >= parts.rank)", "if (at + 1 >= parts.rank)"),
    ("adapters, up", "lora.cu", "if (c >= p.rows)", "if (c + 1 >= p.rows)"),
    ("adapters, up", "lora.cu", "r < p.rank; r++)", "r + 1 < p.rank; r++)"),
    ("adapters, parts", "lora.cu", "r -= parts.part[i++].rank;", "i++, r = 0;"),
    ("adapters, parts", "lora.cu", "y += parts.part[i++].rank", "y += parts.part[i++].rank - 1"),
    ("adapters, clearing", "lora.cu", "if (!add)", "if (!add && column + 1 < out.cols)"),
    ("recorded steps", "record.c", "&& r->n_spans == key->n_spans", ""),
    ("recorded steps", "record.c", "&& r->n_tokens == key->n_tokens", ""),
    ("recorded steps", "record.c", "r->owner == key->owner && r->kv == key->kv", "r->owner == key->owner"),
    ("recorded steps", "record.c", "if (!r->seen || r->n_failed >= MOST_TRIES)", "if (!r->seen || r->n_failed == 0)"),
    ("recorded steps", "record.c", "cudaGraphLaunch(r->exec, c->stream)", "cudaGetLastError()"),
    ("recorded steps", "attn.c", "c->record.n_spans > 0 ? c->record.n_spans : pl_cuda_spans(b)", "pl_cuda_spans(b)"),
    ("recorded steps", "device.c", "(struct pl_cuda_attn_tile){i, i, 1}", "(struct pl_cuda_attn_tile){i, i, 2}"),
    ("ranks", "ranks.cu", "s.widest > 0 ? s.widest * r :", "s.widest > 0 ? s.widest * (r > 0 ? r - 1 : 0) :"),
    ("ranks", "ranks.cu", "while (i >= s.first[r + 1])", "while (i > s.first[r + 1])"),
    ("ranks", "ranks.cu", "for (unsigned r = 1; r < size; r++)", "for (unsigned r = 1; r + 1 < size; r++)"),
    ("sampling, largest value", "sample.cu", "b.at < a.at) ? b : a", "b.at > a.at) ? b : a"),
    ("sampling, weights", "sample.cu", "k < LANES; k++)\n        total", "k + 1 < LANES; k++)\n        total"),
    ("sampling, weights", "sample.cu", "i < end; i += LANES)", "i + LANES < end; i += LANES)"),
    ("sampling, drawing", "sample.cu", "sum + all > goal", "sum > goal"),
    ("sampling, ranks", "sample.cu", "before < left && before + of[i] >= left", "before < left && before + of[i] > left"),
    ("sampling, ranks", "sample.cu", "bits >> known != chosen >> known", "bits >> shift < chosen >> shift"),
    ("sampling, amounts", "sample.cu", "before + more < before ? 1u : 0u", "before + more < before ? 2u : 0u"),
    ("sampling, ties", "sample.cu", "if (here < n)", "if (here <= n)"),
    ("sampling, filters", "sample.cu", "add_kept(work, V, k, d.min_p, sums);", "add_kept(work, V, k, 0, sums);"),
    ("sampling, filters: no barrier", "sample.cu", "s.amounts[i] = {0, 0};\n        __syncthreads();", "s.amounts[i] = {0, 0};"),
    ("sampling, drawing", "sample.cu", "goal; piece++)\n        before", "goal; piece++)\n        own"),
    ("sampling, drawing", "sample.cu", "sum += lane >= d ? other", "sum += lane > d ? other"),
    ("sampling, ties", "sample.cu", "n - s.counts[i] : 0;", "n - s.counts[i] : n;"),
    ("sampling, ties", "sample.cu", "i < warp; i++)\n        n =", "i + 1 < warp; i++)\n        n ="),
    ("sampling, ties: no barrier", "sample.cu", "s.counts[warp] = count;\n    __syncthreads();", "s.counts[warp] = count;"),
    ("sampling, edits", "sample.cu", "i < d.seen; i += THREADS", "i + 1 < d.seen; i += THREADS"),
    ("sampling, edits", "sample.cu", "*at > 0 ? __fdiv_rn", "*at < 0 ? __fdiv_rn"),
    ("sampling, alternatives", "sample.cu", "x[i] == after.value && i > after.at", "x[i] == after.value && i >= after.at"),
    ("training, operands", "train_mm.cu", "if (i < w.cols)\n            put(to", "if (i + 1 < w.cols)\n            put(to"),
    ("training, operands", "train_mm.cu", "*to = __float2bfloat16_rn(v)", "*to = __float2bfloat16_rn(__uint_as_float(__float_as_uint(v) & 0xffff0000u))"),
    ("training, blocks", "train_mm.cu", "type::halves == 2 ? e / 16 : 0", "type::halves == 2 ? (e + 1) / 16 % 2 : 0"),
    ("training, blocks", "train_mm.cu", "row < n && column < w.cols", "row < n && column + 1 < w.cols"),
    ("training, blocks", "train_mm.cu", "put(out + row * stride + column, mine[l][lane])", "put(out + row * stride + column, mine[l ^ 1][lane])"),
    ("training, blocks: no barrier", "train_mm.cu", "__syncwarp();\n        for", "for"),
    ("training, blocks: no barrier", "train_mm.cu", "mine[l][lane]);\n        }\n        __syncwarp();", "mine[l][lane]);\n        }"),
    ("training, panels", "train_mm.c", "p->first += p->n;", "p->first = p->row;"),
    ("training, panels", "train_mm.c", "left < fit ? left : (uint32_t)fit", "left < fit ? left : (uint32_t)fit - 4"),
    ("training, panels", "train_mm.c", ".beta = add || p.first > 0", ".beta = add"),
    ("training, operands that stay", "train_mm.c", " + (x.p - s->m.p), .stride", ", .stride"),
    ("training, operands that stay", "train_mm.c", "x.rows == s->m.rows && x.p", "x.p"),
    ("training, operands that stay", "train_mm.c", "        s->made = true;\n", ""),
    ("training, operands that stay", "train_mm.c", "    *s = (struct pl_cuda_stay){.m = m};", "    s->m = m.p != NULL ? m : s->m;"),
    ("training, head as a whole", "train_mm.c", "p->whole->p + p->first * stride", "p->whole->p + 0 * stride"),
    ("training, head as a whole", "train_mm.c", "p->first < p->whole->made", "false"),
    ("training, head as a whole", "train_mm.c", "made ? p->whole->made : p->first + p->n", "p->whole->made + w->rows"),
    ("training, memory", "train_work.c", "most(passing, panel)", "most(passing, 0 * panel)"),
    ("training, memory", "train_work.c", "rows * V * sizeof(float)", "rows * (V / 2) * sizeof(float)"),
    ("training, memory", "train_work.c", "n[PL_CUDA_SCRATCH_LEFT] = passing", "n[PL_CUDA_SCRATCH_LEFT] = 0"),
    ("training, biases", "train_mm.cu", "= bias[i];", "= bias[i > 0 ? i - 1 : 0];"),
    ("training, biases", "train_mm.c", ".beta = add || bias != NULL", ".beta = add"),
    ("training, adding", "train_mm.cu", "if (i < x.cols)\n        out.p", "if (i + 1 < x.cols)\n        out.p"),
    ("training, column sums", "train_mm.cu", "t < x.rows; t += SUM_ROWS)", "t + 1 < x.rows; t += SUM_ROWS)"),
    ("training, column sums", "train_mm.cu", "w = 1; w < SUM_ROWS; w++", "w = 1; w + 1 < SUM_ROWS; w++"),
    ("training, column sums: no barrier", "train_mm.cu", "[lane] = sum;\n    __syncthreads();", "[lane] = sum;"),
    ("training, loss", "train_mm.cu", "scratch[lane % (LOSS_THREADS / WARP)]", "scratch[lane % (LOSS_THREADS / WARP - 1)]"),
    ("training, loss", "train_mm.cu", "l.best[r] = at >= max", "l.best[r] = at > max"),
    ("training, loss", "train_mm.cu", "i == target ? p - weight", "i + 1 == target ? p - weight"),
    ("training, loss", "train_mm.cu", "sum += expf(x[i] - max)", "sum += i > 0 ? expf(x[i] - max) : 0"),
    ("training, loss: no barrier", "train_mm.cu", "scratch[threadIdx.x / WARP] = v;\n    __syncthreads();", "scratch[threadIdx.x / WARP] = v;"),
    ("training, head", "train_mm.c", "rows_of(h->dh, from, n)", "rows_of(h->dh, 0, n)"),
    ("training, head", "train_mm.c", "h->loss.weight + from", "h->loss.weight"),
    ("training, embeddings", "train_params.cu", "k < p.end; k++", "k + 1 < p.end; k++"),
    ("training, embeddings", "train_params.cu", "whole ? *to : 0", "*to"),
    ("training, embeddings", "train_params.cu", "k < t.end; k++", "k + 1 < t.end; k++"),
    ("training, embeddings", "train_params.cu", "if (i >= dw.cols)", "if (i + 1 >= dw.cols)"),
    ("training, embeddings", "train.c", "{row, first, c->n_sums, PL_CUDA_NO_ROW}", "{row, first + 1, c->n_sums, PL_CUDA_NO_ROW}"),
    ("training, embeddings", "train.c", "whole ? PL_CUDA_NO_ROW : c->n_sums}", "whole ? PL_CUDA_NO_ROW : first}"),
    ("training, embeddings", "train.c", "order[t] = uses[t].token", "order[t] = t"),
    ("training, embeddings: any order", "train.c", "(x->token > y->token) - (x->token < y->token)", "(x->token < y->token) - (x->token > y->token)"),
    ("training, gradients' norm", "train_params.cu", "d > 0; d /= 2)", "d > 1; d /= 2)"),
    ("training, gradients' norm", "train_params.cu", "i < end; i += THREADS", "i + 1 < end; i += THREADS"),
    ("training, gradients' norm: no barrier", "train_params.cu", "+ d];\n        __syncthreads();", "+ d];"),
    ("training, optimizer", "train_params.cu", "* grad * grad", "* grad"),
    ("training, optimizer", "train_params.cu", "    g[i] = 0;\n", ""),
    ("training, optimizer", "train_params.cu", "* o.root + o.eps", "+ o.eps"),
    ("training, norms", "train_rows.cu", "i < x.cols; i += ROW_THREADS) {\n        const float d = gain[i] * d_out[i];\n        d_sum",
     "i + 1 < x.cols; i += ROW_THREADS) {\n        const float d = gain[i] * d_out[i];\n        d_sum"),
    ("training, norms", "train_rows.cu", "layer ? block_sum(d_sum, sums[3]) / n : 0", "0 * d_sum"),
    ("training, norms", "train_rows.cu", "to[i] = add ? to[i] + d : d;", "to[i] = add ? d : to[i] + d;"),
    ("training, norms: no barrier", "train_rows.cu", "block_sum(d_along, sums[2])", "block_sum(d_along, sums[1])"),
    ("training, gains", "train_rows.cu", "end = min(from + PIECE, x.rows)", "end = min(from + PIECE - 1, x.rows)"),
    ("training, gains", "train_rows.cu", "i < n_pieces; i++", "i + 1 < n_pieces; i++"),
    ("training, gains", "train_rows.cu", "dbias[c] += bias;", "dbias[c] = bias;"),
    ("training, rotations", "train_rows.cu", "&to[n + i], &to[i])", "&to[i], &to[n + i])"),
    ("training, rotations", "train_rows.cu", "k / n * head_dim, *const a", "k / n * 2 * n, *const a"),
    ("training, rotations", "train_rows.cu", "inverse ? -1.f : 1.f", "inverse ? 1.f : -1.f"),
    ("training, activations", "train_rows.cu", "0.134145f", "0.044715f"),
    ("training, activations", "train_rows.cu", "if (i < x.cols)\n        row_of(out, blockIdx.x)[i] = activate", "if (i + 1 < x.cols)\n        row_of(out, blockIdx.x)[i] = activate"),
    ("training, activations", "train_rows.cu", "slope_of(gelu, row_of(x, blockIdx.x)[i]).y", "slope_of(gelu, row_of(x, blockIdx.x)[i]).x"),
    ("training, activations", "train_rows.cu", "[F + i] = d * gate * slope.x", "[F + i] = d * up * slope.x"),
    ("training, dropout", "train_rows.cu", "z >> 32)", "z & 0xffffffffu)"),
    ("training, dropout", "train_rows.cu", "(blockIdx.x) * x.cols + i) < bound", "(blockIdx.x) * x.stride + i) < bound"),
    ("training, dropout", "train_rows.cu", "add ? __fadd_rn(*to, v) : v", "add ? v : __fadd_rn(*to, v)"),
    ("training, scattering", "train_rows.cu", "if (i < out.cols)\n        row_of(out, blockIdx.x)[i] = 0", "if (i + 1 < out.cols)\n        row_of(out, blockIdx.x)[i] = 0"),
    ("training, scattering", "train_rows.cu", "row_of(out, rows[blockIdx.x])", "row_of(out, rows[blockIdx.x] > 0 ? rows[blockIdx.x] - 1 : 0)"),
    ("training, attention: tiles", "train_attn.cu", "number -= n;", "number -= n > 1 ? n - 1 : n;"),
    ("training, attention: tiles", "train_attn.cu", "r < n && c < cols ?", "r < n && c + 1 < cols ?"),
    ("training, attention: tiles", "train_attn.cu", "if (r < n && d < D)", "if (r + 1 < n && d < D)"),
    ("training, attention: products", "train_attn.cu", "multiply<false, true>(p, a, b, min(D - from, static_cast<uint32_t>(TILE)))", "multiply<false, true>(p, a, b, TILE / 2)"),
    ("training, attention: products", "train_attn.cu", "multiply<TURNED, false>(sums[c], p, b, y.n)", "multiply<TURNED, false>(sums[c], p, b, y.n - 1)"),
    ("training, attention: no barrier", "train_attn.cu", "head, D, from);\n        __syncthreads();", "head, D, from);"),
    ("training, attention: no barrier", "train_attn.cu", "D, c * TILE);\n        __syncthreads();", "D, c * TILE);"),
    ("training, attention: no barrier", "train_attn.cu", "            __syncthreads();\n            keep(p, ds);", "            keep(p, ds);"),
    ("training, attention: weights", "train_attn.cu", "keys + col() + SIDE * k <= query ?", "keys + col() + SIDE * k < query + 2 ?"),
    ("training, attention: weights", "train_attn.cu", "sums[c].v[i][k] *= before;", "sums[c].v[i][k] *= before > 0 ? 1 : 0;"),
    ("training, attention: weights", "train_attn.cu", "at.sum[i] = at.sum[i] * before + across", "at.sum[i] = at.sum[i] + across"),
    ("training, attention: weights", "train_attn.cu", "at.max[i] + logf(at.sum[i])", "logf(at.sum[i])"),
    ("training, attention: gradients", "train_attn.cu", "(ds.v[i][k] - along)", "(ds.v[i][k] + along)"),
    ("training, attention: gradients", "train_attn.cu", "there && keys + col() + SIDE * k <= q.from + r ?", "there && keys + col() + SIDE * k <= q.from + r + 1 ?"),
    ("training, attention: gradients", "train_attn.cu", "d = threadIdx.x % WARP; h < j.H && d < j.D", "d = threadIdx.x % WARP; h < j.H && d + 1 < j.D"),
    ("training, attention: heads", "train_attn.cu", "h = g * per; h < (g + 1) * per", "h = g * per; h < g * per + 1"),
    ("training, attention: heads", "train_attn.cu", "from = k.from; from < k.len", "from = k.from; from <= k.from"),
    ("training, attention: heads", "train_attn.cu", "g = h / (j.H / j.G), first = q.start + q.from;\n    piece dq", "g = h % j.G, first = q.start + q.from;\n    piece dq"),
]

SUITES = ("traincuda", "train")  # of files whose names begin with "train"
SUITES_OF = {"recorded steps": ("record",), "ranks": ("comm",)}  # families


def sources_of(name):
    """What has to be compiled when a file changes."""
    if not name.endswith(".h"):
        return [name]
    todo, seen = [name], set()
    while todo:
        header = todo.pop()
        for path in Path("cuda").iterdir():
            if path.name not in seen and f'#include "cuda/{header}"' in path.read_text():
                seen.add(path.name)
                todo.append(path.name)
    return sorted(n for n in seen if not n.endswith(".h"))


def run_until_failure(command, env):
    """The first failure that the operation table prints, or how the process ended: with a suite, the last failure of its list."""
    p = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = ""
    watch = threading.Timer(600, p.kill)
    watch.start()
    try:
        for line in p.stdout:
            last = line.strip() or last
            if line.startswith(("FAILED", "cuda_emu:")) or "runtime error" in line or "Sanitizer" in line:
                return line.strip()
        status = p.wait()
        return None if status == 0 else last or f"ended with status {status}"
    finally:
        watch.cancel()
        p.kill()
        p.wait()


def check(number, mutant, args):
    family, name, old, new = mutant
    text = Path("cuda", name).read_text()
    if text.count(old) != 1 or not old:
        return family, name, f"the text occurs {text.count(old)} times", False
    folder = Path(args.out, str(number))
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    (folder / "cuda" / name).write_text(text.replace(old, new))
    objects = args.objects.split()
    for source in sources_of(name):
        path = folder / "cuda" / source
        if not path.exists():
            path.write_text(Path("cuda", source).read_text())
        compiler = args.cc if source.endswith(".c") else args.cxx
        made = folder / f"{source}.o"
        program, *flags = shlex.split(compiler)
        done = subprocess.run([program, f"-I{folder}", *flags, "-O1", "-g0", "-c", str(path), "-o", str(made)], capture_output=True, text=True)
        if done.returncode != 0:
            return family, name, "does not compile: " + done.stderr.strip().splitlines()[0], False
        objects = [str(made) if o.endswith(f"/cuda/{source}.o") else o for o in objects]
    library = folder / "libparley_cuda_emu.so"
    subprocess.run([*shlex.split(args.link), *objects, f"-Wl,-soname,{library.name}", "-lpthread", "-o", str(library)], check=True)
    beside = folder / "nccl_emu"
    shutil.copytree(Path(args.ops).parent / "nccl_emu", beside, dirs_exist_ok=True)  # a link would find the other device, beside its target
    env = {**os.environ, "PARLEY_TEST_CUDA_LIBRARY": str(library.resolve())}
    suites = SUITES if name.startswith("train") else SUITES_OF.get(family, ())
    if suites:
        caught = next(filter(None, (run_until_failure([args.unit], {**env, "CK_RUN_SUITE": suite}) for suite in suites)), None)
    else:
        caught = run_until_failure([args.ops, "cuda-emulated"], env)
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    return family, name, caught or "NOT CAUGHT", caught is not None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("cc", "cxx", "link", "objects", "ops", "unit", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--only", default="", help="regular expression over families")
    args = parser.parse_args()
    chosen = [(i, m) for i, m in enumerate(MUTANTS) if re.search(args.only, m[0])]
    passed = failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for family, name, what, ok in pool.map(lambda c: check(*c, args), chosen):
            print(f"{'caught' if ok else 'FAILED':8}{family:38}{name:18}{what[:110]}", flush=True)
            passed, failed = passed + ok, failed + (not ok)
    print(f"{passed} passed, {failed} failed")
    return failed != 0


sys.exit(main())
