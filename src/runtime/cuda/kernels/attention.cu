// Causal softmax attention over runs of keys, with running maxima and sums: no matrix of all scores.
//
// A block takes ROWS rows of one KV head, a row being one query of one of the heads that share it, and a run of keys, in
// steps of 32. Thread (r, c) scores rows r, r + 16, .. against keys c, c + 8, .. and keeps columns 4 c .. 4 c + 3 of every
// 32 of their results. It reads shared memory by fours: that is what bounds the kernel. Where a span's keys are cut into several runs, results are left unnormalised for `combine`.
// Set from outside: DV, the width of a value, and TR, the rows of a thread.

#define ROWS (16 * TR)
#define KEYS 32
#define CUT 32
// Four columns of padding keep eight rows off the same banks of shared memory, and fours aligned.
#define PADDED 36
#define LOWEST (-3.0e38f)
// Columns of a thread: four per started 32.
#define OWN ((DV + 31) / 32 * 4)

// Spans hold: first query row, queries, first key row, keys. Items: span, first row, first key, end of its keys.
static __device__ float4 four(const float* x) {
    return *(const float4*)x;
}

extern "C" __global__ void __launch_bounds__(128)
    attention(const uint4* spans, const uint4* items, const float* q, const float* k, const float* v, float* result,
              float2* heights, unsigned int group, unsigned int kv_heads, unsigned int dk, float scale, float cap,
              unsigned int window, unsigned int direct, size_t k_columns, size_t k_start, size_t k_stride,
              size_t v_columns, size_t v_start, size_t v_stride) {
    __shared__ __align__(16) float qs[ROWS * PADDED];
    // Keys, then values.
    __shared__ __align__(16) float ks[KEYS * PADDED];
    // Weights of the keys.
    __shared__ __align__(16) float ps[ROWS * PADDED];
    __shared__ float part[ROWS * 8];
    unsigned int t = threadIdx.x;
    unsigned int r = t / 8;
    unsigned int c = t % 8;
    uint4 item = items[blockIdx.x];
    uint4 span = spans[item.x];
    unsigned int kv_head = blockIdx.y;
    unsigned int rows = span.y * group;
    // Keys that the queries of the span do not count in: the first query sees one more than these.
    unsigned int before = span.w - span.y;
    // Keys that each row of this thread sees: begin .. end.
    unsigned int begin[TR], end[TR];
    for (int i = 0; i < TR; i++) {
        unsigned int m = min(item.y + r + 16 * i, rows - 1);
        end[i] = before + m / group + 1;
        begin[i] = window != 0 && end[i] > window ? end[i] - window : 0;
    }
    // Keys that any row of the tile sees, within this item.
    unsigned int tile_end = min(before + (min(item.y + ROWS, rows) - 1) / group + 1, item.w);
    unsigned int tile_begin = item.z;
    unsigned int first_end = before + item.y / group + 1;
    if (window != 0 && first_end > window) {
        tile_begin = max(tile_begin, (first_end - window) / KEYS * KEYS);
    }
    size_t q_columns = (size_t)kv_heads * group * dk;
    float acc[TR][OWN];
    float height[TR], total[TR];
#pragma unroll
    for (int i = 0; i < TR; i++) {
        height[i] = LOWEST;
        total[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            acc[i][j] = 0.0f;
        }
    }
    for (unsigned int key0 = tile_begin; key0 < tile_end; key0 += KEYS) {
        float s[TR][4];
#pragma unroll
        for (int i = 0; i < TR; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                s[i][j] = 0.0f;
            }
        }
        for (unsigned int d0 = 0; d0 < dk; d0 += CUT) {
            __syncthreads();
            for (unsigned int i = t; i < ROWS * CUT; i += 128) {
                unsigned int row = min(item.y + i / CUT, rows - 1);
                unsigned int d = d0 + i % CUT;
                float value = 0.0f;
                if (d < dk) {
                    size_t head = kv_head * group + row % group;
                    value = q[(span.x + row / group) * q_columns + head * dk + d];
                }
                qs[i / CUT * PADDED + i % CUT] = value;
            }
            for (unsigned int i = t; i < KEYS * CUT; i += 128) {
                unsigned int key = key0 + i / CUT;
                unsigned int d = d0 + i % CUT;
                float value = 0.0f;
                if (key < tile_end && d < dk) {
                    value = k[((size_t)span.z + key) * k_columns + k_start + kv_head * k_stride + d];
                }
                ks[i / CUT * PADDED + i % CUT] = value;
            }
            __syncthreads();
#pragma unroll
            for (int d = 0; d < CUT; d += 4) {
                float4 b[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    b[j] = four(&ks[(c + 8 * j) * PADDED + d]);
                }
#pragma unroll
                for (int i = 0; i < TR; i++) {
                    float4 a = four(&qs[(r + 16 * i) * PADDED + d]);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        s[i][j] += a.x * b[j].x;
                        s[i][j] += a.y * b[j].y;
                        s[i][j] += a.z * b[j].z;
                        s[i][j] += a.w * b[j].w;
                    }
                }
            }
        }
        for (int i = 0; i < TR; i++) {
            float own = LOWEST;
            for (int j = 0; j < 4; j++) {
                unsigned int key = key0 + c + 8 * j;
                s[i][j] *= scale;
                if (cap > 0.0f) {
                    s[i][j] = cap * tanhf(s[i][j] / cap);
                }
                if (key >= begin[i] && key < end[i] && key < tile_end) {
                    own = fmaxf(own, s[i][j]);
                }
            }
            part[(r + 16 * i) * 8 + c] = own;
        }
        __syncthreads();
        float shrink[TR], sum[TR];
        for (int i = 0; i < TR; i++) {
            float top = height[i];
            for (int j = 0; j < 8; j++) {
                top = fmaxf(top, part[(r + 16 * i) * 8 + j]);
            }
            shrink[i] = expf(height[i] - top);
            height[i] = top;
            sum[i] = 0.0f;
            for (int j = 0; j < 4; j++) {
                unsigned int key = key0 + c + 8 * j;
                float weight = 0.0f;
                if (key >= begin[i] && key < end[i] && key < tile_end) {
                    weight = expf(s[i][j] - top);
                }
                ps[(r + 16 * i) * PADDED + c + 8 * j] = weight;
                sum[i] += weight;
            }
        }
        __syncthreads();
        for (int i = 0; i < TR; i++) {
            part[(r + 16 * i) * 8 + c] = sum[i];
        }
        __syncthreads();
        for (int i = 0; i < TR; i++) {
            total[i] *= shrink[i];
            for (int j = 0; j < 8; j++) {
                total[i] += part[(r + 16 * i) * 8 + j];
            }
        }
#pragma unroll
        for (int d0 = 0; d0 < DV; d0 += CUT) {
            __syncthreads();
            for (unsigned int i = t; i < KEYS * CUT; i += 128) {
                unsigned int key = key0 + i / CUT;
                unsigned int d = d0 + i % CUT;
                float value = 0.0f;
                if (key < tile_end && d < DV) {
                    value = v[((size_t)span.z + key) * v_columns + v_start + kv_head * v_stride + d];
                }
                ks[i / CUT * PADDED + i % CUT] = value;
            }
            __syncthreads();
            float mixed[TR][4];
#pragma unroll
            for (int i = 0; i < TR; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    mixed[i][j] = 0.0f;
                }
            }
#pragma unroll
            for (int key = 0; key < KEYS; key += 4) {
                float4 b[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    b[j] = four(&ks[(key + j) * PADDED + 4 * c]);
                }
#pragma unroll
                for (int i = 0; i < TR; i++) {
                    float4 a = four(&ps[(r + 16 * i) * PADDED + key]);
                    float weights[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        mixed[i][0] += weights[j] * b[j].x;
                        mixed[i][1] += weights[j] * b[j].y;
                        mixed[i][2] += weights[j] * b[j].z;
                        mixed[i][3] += weights[j] * b[j].w;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < TR; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    acc[i][d0 / 8 + j] = acc[i][d0 / 8 + j] * shrink[i] + mixed[i][j];
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TR; i++) {
        unsigned int m = item.y + r + 16 * i;
        if (m >= rows) {
            continue;
        }
        float factor = 1.0f;
        size_t part_row = ((size_t)blockIdx.x * kv_heads + kv_head) * ROWS + r + 16 * i;
        size_t to = part_row * DV;
        if (direct != 0) {
            factor = 1.0f / total[i];
            to = ((size_t)(span.x + m / group) * kv_heads * group + kv_head * group + m % group) * DV;
        } else if (c == 0) {
            heights[part_row] = make_float2(height[i], total[i]);
        }
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            unsigned int column = j / 4 * 32 + 4 * c + j % 4;
            if (column < DV) {
                result[to + column] = acc[i][j] * factor;
            }
        }
    }
}

// Put the results of the runs of a span's keys together, in order: a block per tile, row and KV head.
// Tiles hold: span, first row, first item, items.
extern "C" __global__ void combine(const uint4* spans, const uint4* tiles, const float* parts, const float2* heights,
                                   float* result, unsigned int group, unsigned int kv_heads) {
    uint4 tile = tiles[blockIdx.x];
    uint4 span = spans[tile.x];
    unsigned int r = blockIdx.y;
    unsigned int kv_head = blockIdx.z;
    unsigned int m = tile.y + r;
    if (m >= span.y * group) {
        return;
    }
    float top = LOWEST;
    for (unsigned int i = 0; i < tile.w; i++) {
        top = fmaxf(top, heights[((size_t)(tile.z + i) * kv_heads + kv_head) * ROWS + r].x);
    }
    size_t to = ((size_t)(span.x + m / group) * kv_heads * group + kv_head * group + m % group) * DV;
    for (unsigned int column = threadIdx.x; column < DV; column += blockDim.x) {
        float sum = 0.0f;
        float total = 0.0f;
        for (unsigned int i = 0; i < tile.w; i++) {
            size_t part = ((size_t)(tile.z + i) * kv_heads + kv_head) * ROWS + r;
            float weight = expf(heights[part].x - top);
            total += weight * heights[part].y;
            sum += weight * parts[part * DV + column];
        }
        result[to + column] = sum / total;
    }
}
