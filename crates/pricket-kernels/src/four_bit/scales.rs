//! Scales of 4-bit blocks, and their quantization to 8 bits (double quantization; Dettmers et al. 2023,
//! arXiv:2305.14314).

use std::sync::OnceLock;

/// Number of blocks that share a scale of their scales.
pub const NESTED_BLOCK: usize = 256;

/// Scales of the blocks of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// One number for each block.
    Plain(Vec<f32>),
    /// Double quantization: the scale of block `i` is `table[codes[i]] · nested[i / nested_block] + offset`.
    Double {
        /// One index for each block.
        codes: Vec<u8>,
        /// The values of the indices, 256.
        table: Vec<f32>,
        /// One scale for every `nested_block` blocks.
        nested: Vec<f32>,
        /// Blocks that share a scale, 256.
        nested_block: usize,
        /// The mean of the scales.
        offset: f32,
    },
}

impl Scales {
    /// Returns the number of blocks.
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(scales) => scales.len(),
            Self::Double { codes, .. } => codes.len(),
        }
    }

    /// Returns whether there are no blocks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the scale of block `i`. Product and sum are rounded one after the other, as in bitsandbytes.
    pub(super) fn of(&self, i: usize) -> f32 {
        match self {
            Self::Plain(scales) => scales[i],
            Self::Double { codes, table, nested, nested_block, offset } => {
                table[codes[i] as usize] * nested[i / nested_block] + offset
            }
        }
    }

    /// Returns the size in memory, in bytes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Plain(scales) => 4 * scales.len(),
            Self::Double { codes, table, nested, .. } => codes.len() + 4 * (table.len() + nested.len()) + 4,
        }
    }

    /// Quantizes `scales` to 8 bits.
    pub(super) fn double(scales: &[f32]) -> Self {
        let offset = mean(scales);
        let table = dynamic_table();
        let (mut codes, mut nested) = (Vec::with_capacity(scales.len()), Vec::new());
        for block in scales.chunks(NESTED_BLOCK) {
            let largest = block.iter().fold(0f32, |max, scale| max.max((scale - offset).abs()));
            // If all scales of the block equal the offset, `inverse` is infinite, the products are NaN, and the index
            // is 0.
            let inverse = 1.0 / largest;
            codes.extend(block.iter().map(|scale| nearest(table, on_grid((scale - offset) * inverse))));
            nested.push(largest);
        }
        Self::Double { codes, table: table.to_vec(), nested, nested_block: NESTED_BLOCK, offset }
    }
}

/// Returns the mean, summed in the order of torch on one thread with vectors of eight (`cascade_sum` in ATen's
/// SumKernel.cpp). The order decides the last bit of the offset, and the offset decides the bytes of the scales.
fn mean(values: &[f32]) -> f32 {
    const LANES: usize = 8;
    const ROWS: usize = 4;
    const LEVELS: usize = 4;
    type Sums = [[f32; LANES]; ROWS];
    let add = |to: &mut [f32; LANES], from: &[f32; LANES]| to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    let (vectors, rest) = values.as_chunks::<LANES>();
    let (steps, left) = vectors.as_chunks::<ROWS>();
    let power = (steps.len().next_power_of_two().ilog2() as usize / LEVELS).max(4);
    let mut sums: [Sums; LEVELS] = Default::default();
    for (i, step) in steps.iter().enumerate() {
        sums[0].iter_mut().zip(step).for_each(|(sum, vector)| add(sum, vector));
        // Whole groups of steps are added to the next level, so that rounding errors stay small.
        let mut count = i + 1;
        for level in 1..LEVELS {
            if !count.is_multiple_of(1 << power) {
                break;
            }
            count >>= power;
            let lower = std::mem::take(&mut sums[level - 1]);
            sums[level].iter_mut().zip(&lower).for_each(|(sum, vector)| add(sum, vector));
        }
    }
    let [mut sum, higher @ ..] = sums;
    for level in &higher {
        sum.iter_mut().zip(level).for_each(|(sum, vector)| add(sum, vector));
    }
    let [mut lanes, rows @ ..] = sum;
    left.iter().chain(&rows).for_each(|vector| add(&mut lanes, vector));
    let total = rest.iter().chain(&lanes).fold(0f32, |sum, x| sum + x);
    total / values.len().max(1) as f32
}

/// Returns the signed dynamic map of 8 bits of bitsandbytes (`create_dynamic_map`): 256 values in ascending order.
fn dynamic_table() -> &'static [f32] {
    static TABLE: OnceLock<Vec<f32>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table = vec![0.0, 1.0];
        for i in 0..7 {
            let steps = 1usize << i;
            // The points of torch's linspace(0.1, 1, steps + 1), from both ends, each rounded once.
            let step = (1.0f32 - 0.1) / steps as f32;
            let point = |j: usize| {
                if j < steps.div_ceil(2) {
                    step.mul_add(j as f32, 0.1)
                } else {
                    (-step).mul_add((steps - j) as f32, 1.0)
                }
            };
            for j in 0..steps {
                let middle = f32::midpoint(point(j), point(j + 1));
                let value = (10f64.powi(i - 6) as f32) * middle;
                table.extend([value, -value]);
            }
        }
        table.sort_by(f32::total_cmp);
        table
    })
}

/// Returns the nearest of 65,536 evenly spaced numbers from -1 to 1. On a CPU, bitsandbytes rounds to this grid before
/// it looks up an index, which matters near the middle of two values of the table.
fn on_grid(x: f32) -> f32 {
    const LAST: f32 = 65535.0;
    let index = ((x.clamp(-1.0, 1.0) + 1.0) * 0.5 * LAST + 0.5).trunc();
    index / LAST * 2.0 - 1.0
}

/// Returns the index of the nearest value of a sorted table, the lower index if two values are equally near, and 0 for
/// NaN.
fn nearest(table: &[f32], x: f32) -> u8 {
    let above = table.partition_point(|&value| value < x).min(table.len() - 1);
    let below = above.saturating_sub(1);
    // No comparison with NaN is true, so both indices are 0.
    if (x - table[below]).abs() <= (table[above] - x).abs() { below as u8 } else { above as u8 }
}
