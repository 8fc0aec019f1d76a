// Row i of `rows` becomes row to[i] of `into`, where that lies in the part that is bound.

struct Params { rows: u32, columns: u32, first: u32, end: u32, first_row: u32, across: u32, unused1: u32, unused2: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> to: array<u32>;
@group(0) @binding(2) var<storage, read> rows: array<f32>;
@group(0) @binding(3) var<storage, read_write> into: array<f32>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let i = (group.y * p.across + group.x) * 128u + t;
    if (i >= p.rows * p.columns) {
        return;
    }
    let row = to[p.first_row + i / p.columns];
    if (row >= p.first && row < p.end) {
        into[(row - p.first) * p.columns + i % p.columns] = rows[i];
    }
}
