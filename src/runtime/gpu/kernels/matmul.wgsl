// y = x W^T + bias in tiles held in registers, for any strides, one product per z.
// Set from outside: BM, BN, BK (tile), TM, TN (per thread), `weight`, and what stands for the lines `//..`: code for each of
// the TM TN results of a thread, written out. Arrays would do, but not every driver keeps those in registers.

struct Params {
    m: u32, n: u32, k: u32, x_stride: u32,
    x_first: u32, x_batch: u32, w_first: u32, w_batch: u32,
    // Distances in W between neighbours in n and in k.
    w_n: u32, w_k: u32, y_stride: u32, y_first: u32,
    y_batch: u32, has_bias: u32, bias_first: u32, unused: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<WORD>;
@group(0) @binding(3) var<storage, read> bias: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

const THREADS = 256u;
const ACROSS = BN / TN;

// One column of padding keeps threads that store along k off the same bank.
var<workgroup> xs: array<f32, (BM + 1u) * BK>;
var<workgroup> ws: array<f32, (BN + 1u) * BK>;

fn store(row: u32, col: u32, z: u32, sum: f32) {
    if (row < p.m && col < p.n) {
        var value = sum;
        if (p.has_bias != 0u) {
            value += bias[p.bias_first + col];
        }
        y[p.y_first + z * p.y_batch + row * p.y_stride + col] = value;
    }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let row0 = group.y * BM;
    let col0 = group.x * BN;
    let x0 = p.x_first + group.z * p.x_batch;
    let w0 = p.w_first + group.z * p.w_batch;
    let tx = t % ACROSS;
    let ty = t / ACROSS;
    //accumulators
    for (var k0 = 0u; k0 < p.k; k0 += BK) {
        for (var i = t; i < BM * BK; i += THREADS) {
            let k = i % BK;
            let r = i / BK;
            var value = 0.0;
            if (row0 + r < p.m && k0 + k < p.k) {
                value = x[x0 + (row0 + r) * p.x_stride + k0 + k];
            }
            xs[k * (BM + 1u) + r] = value;
        }
        for (var i = t; i < BN * BK; i += THREADS) {
            // Neighbouring threads read neighbouring elements, whichever way W lies.
            let along_k = p.w_k == 1u;
            let k = select(i / BN, i % BK, along_k);
            let c = select(i % BN, i / BK, along_k);
            var value = 0.0;
            if (col0 + c < p.n && k0 + k < p.k) {
                value = weight(w0 + (col0 + c) * p.w_n + (k0 + k) * p.w_k);
            }
            ws[k * (BN + 1u) + c] = value;
        }
        workgroupBarrier();
        for (var k = 0u; k < BK; k++) {
            //products
        }
        workgroupBarrier();
    }
    //results
}
