// Causal softmax attention over runs of keys, with running maxima and sums: no matrix of all scores.
//
// A workgroup takes 16 rows of one KV head, a row being one query of one of the heads that share it, and a run of keys,
// in blocks of 32. Thread (r, c) scores row r against keys c, c + 8, .. and keeps columns c, c + 8, .. of its result.
// Where a span's keys are cut into several runs, results are left unnormalised for `combine`.
// Set from outside: DV, the width of a value.

struct Params {
    group: u32, kv_heads: u32, dk: u32, scale: f32,
    q_first: u32, k_first: u32, window: u32, direct: u32,
    k_columns: u32, k_start: u32, k_stride: u32, across: u32,
    v_columns: u32, v_start: u32, v_stride: u32, items: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
// Per span: first query row, queries, first key row, keys.
@group(0) @binding(1) var<storage, read> spans: array<vec4<u32>>;
// Per item: span, first row, first key, end of its keys.
@group(0) @binding(2) var<storage, read> items: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> q: array<f32>;
@group(0) @binding(4) var<storage, read> k: array<f32>;
@group(0) @binding(5) var<storage, read> v: array<f32>;
@group(0) @binding(6) var<storage, read_write> result: array<f32>;
// Largest score and sum of weights, for `combine`.
@group(0) @binding(7) var<storage, read_write> heights: array<vec2<f32>>;

const ROWS = 16u;
const KEYS = 32u;
const CUT = 32u;
const PADDED = 33u;
const LOWEST = -3.0e38;
// Accumulators per thread: four per started 32 columns.
const OWN = (DV + 31u) / 32u * 4u;

var<workgroup> qs: array<f32, ROWS * PADDED>;
var<workgroup> ks: array<f32, KEYS * PADDED>;
var<workgroup> ps: array<f32, ROWS * PADDED>;
var<workgroup> part: array<f32, 128>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let index = wg.y * p.across + wg.x;
    let item = items[min(index, p.items - 1u)];
    let span = spans[item.x];
    let kv_head = wg.z;
    let rows = span.y * p.group;
    let r = t / 8u;
    let c = t % 8u;
    let m = min(item.y + r, rows - 1u);
    let live = item.y + r < rows && index < p.items;
    // Keys this row sees: `begin..end`.
    let end = span.w - span.y + m / p.group + 1u;
    var begin = 0u;
    if (p.window != 0u && end > p.window) {
        begin = end - p.window;
    }
    // Keys that any row of the tile sees, within this item.
    let last = min(item.y + ROWS, rows) - 1u;
    let tile_end = min(span.w - span.y + last / p.group + 1u, item.w);
    var tile_begin = item.z;
    let first_end = span.w - span.y + item.y / p.group + 1u;
    if (p.window != 0u && first_end > p.window) {
        tile_begin = max(tile_begin, (first_end - p.window) / KEYS * KEYS);
    }
    let q_columns = p.kv_heads * p.group * p.dk;
    var acc: array<f32, OWN>;
    var height = LOWEST;
    var total = 0.0;
    for (var key0 = tile_begin; key0 < tile_end; key0 += KEYS) {
        var s: array<f32, 4>;
        for (var d0 = 0u; d0 < p.dk; d0 += CUT) {
            workgroupBarrier();
            for (var i = t; i < ROWS * CUT; i += 128u) {
                let row = min(item.y + i / CUT, rows - 1u);
                let d = d0 + i % CUT;
                var value = 0.0;
                if (d < p.dk) {
                    let head = kv_head * p.group + row % p.group;
                    value = q[(span.x - p.q_first + row / p.group) * q_columns + head * p.dk + d];
                }
                qs[(i / CUT) * PADDED + i % CUT] = value;
            }
            for (var i = t; i < KEYS * CUT; i += 128u) {
                let key = key0 + i / CUT;
                let d = d0 + i % CUT;
                var value = 0.0;
                if (key < tile_end && d < p.dk) {
                    value = k[(span.z - p.k_first + key) * p.k_columns + p.k_start + kv_head * p.k_stride + d];
                }
                ks[(i / CUT) * PADDED + i % CUT] = value;
            }
            workgroupBarrier();
            for (var d = 0u; d < CUT; d++) {
                let a = qs[r * PADDED + d];
                for (var j = 0u; j < 4u; j++) {
                    s[j] += a * ks[(c + 8u * j) * PADDED + d];
                }
            }
        }
        var own = LOWEST;
        for (var j = 0u; j < 4u; j++) {
            let key = key0 + c + 8u * j;
            if (key >= begin && key < end && key < tile_end) {
                s[j] *= p.scale;
                own = max(own, s[j]);
            }
        }
        part[t] = own;
        workgroupBarrier();
        var top = height;
        for (var j = 0u; j < 8u; j++) {
            top = max(top, part[r * 8u + j]);
        }
        let shrink = exp(height - top);
        height = top;
        var sum = 0.0;
        for (var j = 0u; j < 4u; j++) {
            let key = key0 + c + 8u * j;
            var weight = 0.0;
            if (key >= begin && key < end && key < tile_end) {
                weight = exp(s[j] - top);
            }
            ps[r * PADDED + c + 8u * j] = weight;
            sum += weight;
        }
        workgroupBarrier();
        part[t] = sum;
        workgroupBarrier();
        total *= shrink;
        for (var j = 0u; j < 8u; j++) {
            total += part[r * 8u + j];
        }
        for (var d0 = 0u; d0 < DV; d0 += CUT) {
            workgroupBarrier();
            for (var i = t; i < KEYS * CUT; i += 128u) {
                let key = key0 + i / CUT;
                let d = d0 + i % CUT;
                var value = 0.0;
                if (key < tile_end && d < DV) {
                    value = v[(span.z - p.k_first + key) * p.v_columns + p.v_start + kv_head * p.v_stride + d];
                }
                ks[(i / CUT) * PADDED + i % CUT] = value;
            }
            workgroupBarrier();
            for (var j = 0u; j < 4u; j++) {
                var mixed = 0.0;
                for (var key = 0u; key < KEYS; key++) {
                    mixed += ps[r * PADDED + key] * ks[key * PADDED + c + 8u * j];
                }
                let at = d0 / 8u + j;
                acc[at] = acc[at] * shrink + mixed;
            }
        }
    }
    if (!live) {
        return;
    }
    var factor = 1.0;
    var to = ((index * p.kv_heads + kv_head) * ROWS + r) * DV;
    if (p.direct != 0u) {
        factor = 1.0 / total;
        let head = kv_head * p.group + m % p.group;
        to = ((span.x - p.q_first + m / p.group) * p.kv_heads * p.group + head) * DV;
    } else if (c == 0u) {
        heights[(index * p.kv_heads + kv_head) * ROWS + r] = vec2<f32>(height, total);
    }
    for (var i = 0u; i < OWN; i++) {
        let column = i / 4u * 32u + c + i % 4u * 8u;
        if (column < DV) {
            result[to + column] = acc[i] * factor;
        }
    }
}
