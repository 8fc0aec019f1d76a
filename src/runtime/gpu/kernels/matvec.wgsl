// y = x W^T + bias for up to R rows of x: every element of W is read once, by lanes side by side.
// Set from outside: R and `weight`.

struct Params {
    m: u32, n: u32, k: u32, has_bias: u32,
    y_stride: u32, y_first: u32, bias_first: u32, across: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<WORD>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

const LANES = 32u;
const OUTS = 4u;

var<workgroup> sums: array<f32, LANES * OUTS * R>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let lane = t % LANES;
    let col = (group.y * p.across + group.x) * OUTS + t / LANES;
    var acc: array<f32, R>;
    if (col < p.n) {
        for (var k = lane; k < p.k; k += LANES) {
            let value = weight(col * p.k + k);
            for (var r = 0u; r < R; r++) {
                acc[r] += x[min(r, p.m - 1u) * p.k + k] * value;
            }
        }
    }
    for (var r = 0u; r < R; r++) {
        sums[t * R + r] = acc[r];
    }
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) {
            for (var r = 0u; r < R; r++) {
                sums[t * R + r] += sums[(t + half) * R + r];
            }
        }
    }
    if (lane == 0u && col < p.n) {
        for (var r = 0u; r < R; r++) {
            if (r < p.m) {
                var value = sums[t * R + r];
                if (p.has_bias != 0u) {
                    value += bias[p.bias_first + col];
                }
                y[r * p.y_stride + p.y_first + col] = value;
            }
        }
    }
}
