//! MoE routers on a GPU: the experts of each token, (token, expert) pairs sorted by expert, inputs
//! of experts and weighted sums of their outputs. Results are bit-identical to the CPU forms
//! (`ffn` in the worker).
//!
//! Values are row-major, contiguous and belong to the given stream.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DriverError};

use crate::fused::Real;
use crate::kernels::Argument::{Address, Float, Number};
use crate::kernels::{File, Grid, launch, number, room};
use crate::readback::{Part, Readback};

/// Threads per block of most kernels.
const THREADS: usize = 256;
/// Columns per block of kernels that copy or add rows.
const COLUMNS: usize = 4 * THREADS;
/// Threads that choose the experts of a token.
const LANES: usize = 32;
/// Tokens per block when choices are counted.
const TILE: usize = 64;
/// Windows of 32 f64 exponents that cover all f32 values.
const WINDOWS: usize = 9;
/// The first window.
const FIRST_WINDOW: u16 = 27;
/// Numbers per expert load: tokens at position 0, and two halves per window for two sums.
const LOAD: usize = 1 + 4 * WINDOWS;

/// How logits become choices; the discriminants are those of `route.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Softmax over all experts, then top-k.
    SoftmaxTopK = 0,
    /// Top-k, then softmax over the chosen experts.
    TopKSoftmax = 1,
    /// Sigmoids; top-k of sigmoid plus correction; groups ranked by the sum of their two best.
    SigmoidGroups = 2,
    /// Top-k, then sigmoids of the chosen experts.
    SigmoidOfInput = 3,
    /// Softmax over all experts; groups ranked by their best expert.
    SoftmaxGroups = 4,
    /// Softmax over all experts; chosen weights are divided by their sum and multiplied by a
    /// factor per expert.
    NormedSoftmax = 5,
}

/// A router's rule.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Scoring.
    pub kind: Kind,
    /// Number of groups of adjacent experts, of equal size.
    pub groups: usize,
    /// Number of groups from which experts are chosen.
    pub top_groups: usize,
    /// Whether weights are divided by their sum.
    pub normalise: bool,
    /// Factor of the weights.
    pub factor: f32,
}

/// Chooses experts for each row of `logits` `[rows, experts]`. Returns experts, ascending, and
/// their weights, both `[rows, top_k]`. `per_expert` `[experts]` is the correction or factor of
/// the rule.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn choose(
    stream: &Arc<CudaStream>,
    logits: &CudaView<'_, f32>,
    per_expert: Option<&CudaView<'_, f32>>,
    [experts, top_k]: [usize; 2],
    rule: Rule,
) -> Result<(CudaSlice<u32>, CudaSlice<f32>), DriverError> {
    let rows = logits.len() / experts;
    assert_eq!(rows * experts, logits.len(), "rows of {experts} logits");
    assert!((1..=experts).contains(&top_k), "top {top_k} of {experts} experts");
    assert!(rule.groups > 0 && experts.is_multiple_of(rule.groups), "{experts} experts, {rule:?}");
    assert!(per_expert.is_none_or(|numbers| numbers.len() == experts), "a number of each expert");
    assert!(per_expert.is_some() || rule.kind != Kind::NormedSoftmax, "{rule:?} without numbers of experts");
    let mut scores = room::<f32>(stream, 2 * rows * experts)?;
    let mut keys = room::<u32>(stream, rows * (experts + rule.groups + top_k))?;
    let (mut chosen, mut weights) = (room::<u32>(stream, rows * top_k)?, room::<f32>(stream, rows * top_k)?);
    {
        let (logits, _logits) = logits.device_ptr(stream);
        let per_expert = per_expert.map(|numbers| numbers.device_ptr(stream));
        let ((scores, _scores), (keys, _keys)) = (scores.device_ptr_mut(stream), keys.device_ptr_mut(stream));
        let ((chosen, _chosen), (weights, _weights)) = (chosen.device_ptr_mut(stream), weights.device_ptr_mut(stream));
        let arguments = [
            Address(logits),
            Address(per_expert.as_ref().map_or(0, |(numbers, _)| *numbers)),
            number(experts),
            number(top_k),
            Number(rule.kind as u32),
            number(rule.groups),
            number(rule.top_groups),
            Number(rule.normalise.into()),
            Float(rule.factor),
            Address(scores),
            Address(keys),
            Address(chosen),
            Address(weights),
        ];
        let grid = Grid { blocks: [rows, 1], threads: LANES };
        // SAFETY: rows of so many logits, and room for as many choices, scores and keys.
        unsafe { launch(stream, File::Route, "choose_experts", grid, &arguments) }?;
    }
    Ok((chosen, weights))
}

/// Positions of rows: rows of sequences of `tokens` tokens each, starting at `first_token`.
#[derive(Clone, Copy, Debug)]
pub struct Positions {
    /// Token of the first row.
    pub first_token: usize,
    /// Tokens per sequence.
    pub tokens: usize,
}

/// (token, expert) pairs sorted by expert.
pub struct Sorted {
    /// Tokens, ascending within an expert.
    pub tokens: CudaSlice<u32>,
    /// Weights, in the same order.
    pub weights: CudaSlice<f32>,
    /// Counts per expert, for the host.
    pub counts: CountsReadback,
}

/// Sorts the choices of `top_k` experts per token by expert. With `positions`, also sums the load
/// of each expert.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn sort(
    stream: &Arc<CudaStream>,
    chosen: &CudaView<'_, u32>,
    weights: &CudaView<'_, f32>,
    [experts, top_k]: [usize; 2],
    positions: Option<Positions>,
) -> Result<Sorted, DriverError> {
    let (pairs, rows) = (chosen.len(), chosen.len() / top_k);
    assert_eq!([rows * top_k, weights.len()], [pairs; 2], "top {top_k} experts of each token, and their weights");
    let tiles = rows.div_ceil(TILE);
    let mut tallies = room::<u32>(stream, tiles * experts)?;
    let told = experts + 1 + if positions.is_some() { experts * LOAD } else { 0 };
    let mut summary = room::<u64>(stream, told)?;
    let (mut tokens, mut sorted) = (room::<u32>(stream, pairs)?, room::<f32>(stream, pairs)?);
    {
        let ((chosen, _chosen), (weights, _weights)) = (chosen.device_ptr(stream), weights.device_ptr(stream));
        let ((tallies, _tallies), (firsts, _firsts)) = (tallies.device_ptr_mut(stream), summary.device_ptr_mut(stream));
        let ((tokens, _tokens), (sorted, _sorted)) = (tokens.device_ptr_mut(stream), sorted.device_ptr_mut(stream));
        let numbers = [rows, top_k, experts].map(number);
        let by_tile = Grid { blocks: [tiles, experts.div_ceil(THREADS)], threads: THREADS };
        let arguments = [&[Address(chosen)], &numbers[..], &[Address(tallies)]].concat();
        // SAFETY: choices of so many tokens, and a number per tile and expert.
        unsafe { launch(stream, File::Route, "count_choices", by_tile, &arguments) }?;
        let arguments = [Address(tallies), number(tiles), number(experts), Address(firsts)];
        let one = Grid { blocks: [1, 1], threads: THREADS };
        // SAFETY: a number per tile and expert, and one more than experts.
        unsafe { launch(stream, File::Route, "find_firsts", one, &arguments) }?;
        let places = [tallies, firsts, tokens, sorted].map(Address);
        let arguments = [&[Address(chosen), Address(weights)], &numbers[..], &places[..]].concat();
        // SAFETY: as above, and room for as many pairs as choices.
        unsafe { launch(stream, File::Route, "sort_pairs", by_tile, &arguments) }?;
        if let Some(Positions { first_token, tokens: per_sequence }) = positions {
            let loads = firsts + (size_of::<u64>() * (experts + 1)) as u64;
            let numbers = [first_token % per_sequence, per_sequence].map(number);
            let places = [tokens, sorted, firsts].map(Address);
            let arguments = [&places[..], &numbers[..], &[Address(loads)]].concat();
            let by_expert = Grid { blocks: [experts, 1], threads: THREADS };
            // SAFETY: pairs by expert, and room for each one's load behind where they begin.
            unsafe { launch(stream, File::Route, "sum_loads", by_expert, &arguments) }?;
        }
    }
    let counts = CountsReadback::new(stream, &summary, experts)?;
    Ok(Sorted { tokens, weights: sorted, counts })
}

/// Load of one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Tokens at position 0.
    pub tokens_at_position_0: u64,
    /// Sum of the weights of its tokens.
    pub mass: Mass,
    /// Sum of the weights of its tokens at position 0.
    pub mass_at_position_0: Mass,
}

/// An exact sum of f32 values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mass([i128; WINDOWS]);

impl Mass {
    fn new(halves: &[u64]) -> Self {
        let whole = |window: usize| {
            let [low, high] = [halves[2 * window], halves[2 * window + 1]].map(|half| i128::from(half as i64));
            // In units of an f64's last bit.
            ((high << 32) + low) << 29
        };
        Self(std::array::from_fn(whole))
    }

    /// As windows of 32 exponents `w` with whole numbers of 2^(32 w - 1075); zeros are left out.
    pub fn windows(&self) -> impl Iterator<Item = (u16, i128)> {
        (FIRST_WINDOW..).zip(self.0).filter(|(_, whole)| *whole != 0)
    }
}

/// Counts on their way to the host.
pub struct CountsReadback {
    readback: Readback,
    experts: usize,
}

impl CountsReadback {
    fn new(stream: &Arc<CudaStream>, counts: &CudaSlice<u64>, experts: usize) -> Result<Self, DriverError> {
        Ok(Self { readback: Readback::start(stream, &[Part::of(counts, stream)])?, experts })
    }

    /// First pair of each expert, and after the last expert the number of pairs; and the load of
    /// each expert, if requested. Waits for the copy.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn wait(self) -> Result<(Vec<usize>, Vec<Load>), DriverError> {
        let counts = self.readback.u64s(0)?;
        let (firsts, loads) = counts.split_at(self.experts + 1);
        let load = |load: &[u64; LOAD]| Load {
            tokens_at_position_0: load[0],
            mass: Mass::new(&load[1..=2 * WINDOWS]),
            mass_at_position_0: Mass::new(&load[1 + 2 * WINDOWS..]),
        };
        let firsts = firsts.iter().map(|first| *first as usize).collect();
        Ok((firsts, loads.as_chunks::<LOAD>().0.iter().map(load).collect()))
    }
}

/// Memory of so many values for [`gather_rows`], which are unspecified before.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn gathered<T: Real>(stream: &Arc<CudaStream>, values: usize) -> Result<CudaSlice<T>, DriverError> {
    room(stream, values)
}

/// Copies the rows of `x` `[tokens, width]` that go to a group of experts to `out`, each expert's
/// to the rows from its one of `places` on. `firsts` says where each one's pairs begin among
/// `tokens`, and after the last one where they end. Rows are multiplied by `weights`, if there are
/// any, which are of all pairs, as `tokens` are.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn gather_rows<T: Real>(
    stream: &Arc<CudaStream>,
    out: &mut CudaViewMut<'_, T>,
    x: &CudaView<'_, T>,
    tokens: &CudaView<'_, u32>,
    weights: Option<&CudaView<'_, f32>>,
    [firsts, places]: [&[usize]; 2],
    width: usize,
) -> Result<(), DriverError> {
    let (first, end) = (firsts[0], firsts[places.len()]);
    assert!(firsts.len() == places.len() + 1 && end <= tokens.len(), "where pairs of {} experts begin", places.len());
    let fits = |(pairs, place): (&[usize], &usize)| (place + pairs[1] - pairs[0]) * width <= out.len();
    assert!(firsts.windows(2).zip(places).all(fits), "room for what experts are sent");
    assert!(weights.is_none_or(|weights| weights.len() == tokens.len()), "pairs and their weights");
    if first == end {
        return Ok(());
    }
    let table: Vec<u32> = firsts.iter().chain(places).map(|at| *at as u32).collect();
    let table = stream.clone_htod(&table)?;
    let ((x, _x), (tokens, _tokens)) = (x.device_ptr(stream), tokens.device_ptr(stream));
    let (weights, (table, _table)) = (weights.map(|weights| weights.device_ptr(stream)), table.device_ptr(stream));
    let (out, _out) = out.device_ptr_mut(stream);
    let at = Address(weights.as_ref().map_or(0, |(weights, _)| *weights));
    let numbers = [places.len(), width].map(number);
    let arguments = [&[Address(x), Address(tokens), at, Address(table)], &numbers[..], &[Address(out)]].concat();
    let grid = Grid { blocks: [end - first, width.div_ceil(COLUMNS)], threads: THREADS };
    // SAFETY: pairs that are there, of rows of `x`, as `sort` gave them, and room where they go.
    unsafe { launch(stream, File::Route, &format!("gather_rows_{}", T::DTYPE), grid, &arguments) }
}

/// `out[tokens[i]] += weights[i] * made[i]` over rows of `width`; without `weights` they are 1.
/// `tokens` are distinct rows of `out`.
///
/// # Errors
/// Errors of the CUDA driver.
pub fn add_rows<T: Real>(
    stream: &CudaStream,
    out: &mut CudaViewMut<'_, T>,
    made: &CudaView<'_, T>,
    tokens: &CudaView<'_, u32>,
    weights: Option<&CudaView<'_, f32>>,
    width: usize,
) -> Result<(), DriverError> {
    let rows = tokens.len();
    assert_eq!(made.len(), rows * width, "{rows} rows of {width}");
    assert!(weights.is_none_or(|weights| weights.len() == rows), "{rows} rows and their weights");
    let ((made, _made), (tokens, _tokens)) = (made.device_ptr(stream), tokens.device_ptr(stream));
    let weights = weights.map(|weights| weights.device_ptr(stream));
    let (out, _out) = out.device_ptr_mut(stream);
    let at = Address(weights.as_ref().map_or(0, |(weights, _)| *weights));
    let arguments = [Address(made), Address(tokens), at, number(width), Address(out)];
    let grid = Grid { blocks: [rows, width.div_ceil(COLUMNS)], threads: THREADS };
    // SAFETY: rows of so many values; tokens that `sort` gave, of as many rows as `out` has.
    unsafe { launch(stream, File::Route, &format!("add_rows_{}", T::DTYPE), grid, &arguments) }
}
