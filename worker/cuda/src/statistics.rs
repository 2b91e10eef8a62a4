//! Statistics of activations on the GPU in their own dtype, in one pass: the GPU forms of
//! `outliers_scan`. Only summaries are copied to the host.

use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut, DriverError, SyncOnDrop};
use half::{bf16, f16};
use outliers_scan::{BINS, Column, Columns, ExceedingPositions, Histogram, Large, Row, STRIP, Scan};
use rayon::prelude::*;

use crate::kernels::Argument::{Address, Float, Number};
use crate::kernels::{Argument, File, Grid, launch, number, room};
use crate::readback::{Part, Readback, StreamPerContext};

/// Threads per block of most kernels, and values per digit of a magnitude.
const THREADS: usize = 256;
/// Rows per block of the moments kernel: eight threads each.
const MOMENT_ROWS: usize = THREADS / 8;
/// Columns per block of the kernel that joins strips.
const JOINED: usize = 32;
/// Initial capacity for large values.
const ROOM: usize = 1 << 12;

/// Values in a GPU's memory.
pub enum Stored<'a> {
    /// Single precision.
    F32(CudaView<'a, f32>),
    /// bfloat16.
    Bf16(CudaView<'a, bf16>),
    /// IEEE half precision.
    F16(CudaView<'a, f16>),
}

impl Stored<'_> {
    /// Its name in the kernels' names.
    fn dtype(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::Bf16(_) => "bf16",
            Self::F16(_) => "f16",
        }
    }

    /// Shifts of the digits of its magnitudes, highest first.
    fn shifts(&self) -> &'static [u32] {
        match self {
            Self::F32(_) => &[24, 16, 8, 0],
            Self::Bf16(_) => &[24, 16],
            Self::F16(_) => &[24, 16, 8],
        }
    }

    /// A copy of the reference.
    fn again(&self) -> Stored<'_> {
        match self {
            Self::F32(x) => Stored::F32(x.slice(..)),
            Self::Bf16(x) => Stored::Bf16(x.slice(..)),
            Self::F16(x) => Stored::F16(x.slice(..)),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
            Self::F16(x) => x.len(),
        }
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.len() * if matches!(self, Self::F32(_)) { size_of::<f32>() } else { size_of::<u16>() }
    }

    pub(crate) fn address<'a>(&'a self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        match self {
            Self::F32(x) => x.device_ptr(stream),
            Self::Bf16(x) => x.device_ptr(stream),
            Self::F16(x) => x.device_ptr(stream),
        }
    }
}

/// Activations on a GPU.
pub struct Activation<'a> {
    stream: Arc<CudaStream>,
    x: Stored<'a>,
    rows: usize,
    width: usize,
    tokens: usize,
}

impl<'a> Activation<'a> {
    /// `x` `[rows, width]`, row-major: whole sequences of `tokens` rows each. `stream` computes
    /// them.
    pub fn new(stream: Arc<CudaStream>, x: Stored<'a>, width: usize, tokens: usize) -> Self {
        let rows = x.len() / width;
        debug_assert!(tokens == 0 || rows.is_multiple_of(tokens), "{rows} rows are not of whole sequences");
        Self { stream, x, rows, width, tokens }
    }

    /// Enqueues the statistics: rows and magnitudes; columns, if there is a `threshold` > 0
    /// (values with |x| >= `threshold`); and medians of sequences, if requested. Returns before
    /// the summaries are copied.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn start_scan(&self, threshold: Option<f32>, medians: bool) -> Result<PendingScan, DriverError> {
        let (rows, width, tokens) = (self.rows, self.width, self.tokens);
        let mut pending = PendingScan { rows, width, tokens, readback: None, marks: None, medians: None };
        if rows == 0 {
            return Ok(pending);
        }
        let of_rows = self.look_at_rows()?;
        let of_columns = threshold.map(|threshold| self.look_at_columns(threshold)).transpose()?;
        let of_sequences = if medians { Some(self.look_for_medians()?) } else { None };
        let OfRows { order, moments, counts } = &of_rows;
        let stream = &*self.stream;
        let mut parts = vec![Part::of(order, stream), Part::of(moments, stream), Part::of(counts, stream)];
        if let Some(OfColumns { counts, extremes, sums, .. }) = &of_columns {
            parts.extend([Part::of(counts, stream), Part::of(extremes, stream), Part::of(sums, stream)]);
        }
        if let Some(prefixes) = &of_sequences {
            pending.medians = Some((parts.len(), *self.x.shifts().last().expect("each has some")));
            parts.push(Part::of(prefixes, stream));
        }
        pending.readback = Some(Readback::start(&self.stream, &parts)?);
        drop(parts);
        pending.marks = of_columns.zip(threshold).map(|(of_columns, threshold)| (threshold, of_columns.marks));
        Ok(pending)
    }

    fn look_at_rows(&self) -> Result<OfRows, DriverError> {
        let (rows, width) = (self.rows, self.width);
        let mut order = room::<u32>(&self.stream, 2 * rows)?;
        let mut moments = room::<f64>(&self.stream, 2 * rows)?;
        let mut counts = self.stream.alloc_zeros::<u64>(self.sequences() * BINS)?;
        let grid = Grid { blocks: [rows, 1], threads: threads_for(width) };
        // SAFETY: two numbers per row.
        unsafe { self.launch(File::Rows, "order", grid, &[number(width), self.to(&mut order)]) }?;
        let grid = Grid { blocks: [rows.div_ceil(MOMENT_ROWS), 1], threads: THREADS };
        // SAFETY: two numbers per row.
        unsafe { self.launch(File::Rows, "moments", grid, &[number(rows), number(width), self.to(&mut moments)]) }?;
        let arguments = [number(width), number(self.tokens), self.to(&mut counts)];
        // SAFETY: all bins of each sequence.
        unsafe { self.launch(File::Histogram, "magnitudes", self.strips(), &arguments) }?;
        Ok(OfRows { order, moments, counts })
    }

    fn look_at_columns(&self, threshold: f32) -> Result<OfColumns, DriverError> {
        let (width, sequences) = (self.width, self.sequences());
        let strips = self.strips().blocks[0];
        let (of_strips, of_sequences) = (strips * width, sequences * width);
        let mut marks = room::<u32>(&self.stream, 2 * of_strips)?;
        let mut parts = room::<f32>(&self.stream, 6 * of_strips)?;
        let mut counts = room::<u32>(&self.stream, 2 * of_sequences)?;
        let mut extremes = room::<f32>(&self.stream, 2 * of_sequences)?;
        let mut sums = room::<f64>(&self.stream, 4 * of_sequences)?;
        let arguments =
            [number(width), number(self.tokens), Float(threshold), self.to(&mut marks), self.to(&mut parts)];
        let grid = Grid { blocks: [strips, width.div_ceil(THREADS)], threads: THREADS };
        // SAFETY: two words and six numbers per strip and column.
        unsafe { self.launch(File::Columns, "strips", grid, &arguments) }?;
        let arguments = [
            self.to(&mut marks),
            self.to(&mut parts),
            number(width),
            number(strips / sequences),
            self.to(&mut counts),
            self.to(&mut extremes),
            self.to(&mut sums),
        ];
        let grid = Grid { blocks: [sequences, width.div_ceil(JOINED)], threads: THREADS };
        // SAFETY: what the strips gave; two counts, two values and four sums per sequence and
        // column.
        unsafe { launch(&self.stream, File::Columns, "join", grid, &arguments) }?;
        Ok(OfColumns { marks, counts, extremes, sums })
    }

    /// Histogram of the highest digit of each sequence's median.
    fn look_for_medians(&self) -> Result<CudaSlice<u32>, DriverError> {
        let sequences = self.sequences();
        let rank = (self.tokens * self.width - 1) as u64 / 2;
        let mut ranks = self.stream.clone_htod(&vec![rank; sequences])?;
        let mut prefixes = self.stream.alloc_zeros::<u32>(sequences)?;
        let mut counts = self.stream.alloc_zeros::<u64>(sequences * THREADS)?;
        for shift in self.x.shifts() {
            let (prefixes, counts) = (self.to(&mut prefixes), self.to(&mut counts));
            let arguments = [number(self.width), number(self.tokens), Number(*shift), prefixes, counts];
            // SAFETY: a number, and the counts of all digits, per sequence.
            unsafe { self.launch(File::Histogram, "digits", self.strips(), &arguments) }?;
            let grid = Grid { blocks: [sequences, 1], threads: THREADS };
            // SAFETY: as above, and a rank per sequence.
            unsafe { launch(&self.stream, File::Histogram, "choose", grid, &[counts, prefixes, self.to(&mut ranks)]) }?;
        }
        Ok(prefixes)
    }

    /// The words of `marks` of the listed columns, `[listed, strips]`.
    fn positions(&self, marks: &CudaSlice<u32>, listed: &[usize], strips: usize) -> Result<Vec<u32>, DriverError> {
        if listed.is_empty() {
            return Ok(Vec::new());
        }
        let columns: Vec<u32> = listed.iter().map(|dim| *dim as u32).collect();
        let mut columns = self.stream.clone_htod(&columns)?;
        let mut words = room::<u32>(&self.stream, listed.len() * strips)?;
        let (marks, _read) = marks.device_ptr(&self.stream);
        let arguments =
            [Address(marks), self.to(&mut columns), number(self.width), number(strips), self.to(&mut words)];
        let grid = Grid { blocks: [listed.len(), strips.div_ceil(THREADS)], threads: THREADS };
        // SAFETY: a word per listed column and strip.
        unsafe { launch(&self.stream, File::Columns, "positions", grid, &arguments) }?;
        self.stream.clone_dtoh(&words)
    }

    /// Values of the listed rows whose |x| has at least the given bits, in order of rows and
    /// columns.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    fn large(&self, asked: &[(usize, u32)]) -> Result<Vec<Large>, DriverError> {
        if asked.is_empty() {
            return Ok(Vec::new());
        }
        assert!(asked.iter().all(|(row, _)| *row < self.rows), "rows that are not there");
        let pairs: Vec<u32> = asked.iter().flat_map(|(row, floor)| [*row as u32, *floor]).collect();
        let mut pairs = self.stream.clone_htod(&pairs)?;
        let mut room = ROOM;
        let mut found: Vec<Large> = loop {
            let mut places = self.stream.alloc_zeros::<u32>(3 * room)?;
            let mut count = self.stream.alloc_zeros::<u32>(1)?;
            let arguments =
                [number(self.width), self.to(&mut pairs), number(room), self.to(&mut places), self.to(&mut count)];
            let grid = Grid { blocks: [asked.len(), 1], threads: THREADS };
            // SAFETY: rows that are there; three numbers for each value there is room for, and a
            // count.
            unsafe { self.launch(File::Large, "large", grid, &arguments) }?;
            let count = self.stream.clone_dtoh(&count)?[0] as usize;
            if count > room {
                room = count;
                continue;
            }
            let large = |place: &[u32; 3]| Large {
                row: place[0] as usize,
                dim: place[1] as usize,
                value: f32::from_bits(place[2]),
            };
            let places = if count == 0 { Vec::new() } else { self.stream.clone_dtoh(&places.slice(..3 * count))? };
            break places.as_chunks::<3>().0.iter().map(large).collect();
        };
        found.sort_by_key(|large| (large.row, large.dim));
        Ok(found)
    }

    fn sequences(&self) -> usize {
        self.rows / self.tokens
    }

    /// One block per strip.
    fn strips(&self) -> Grid {
        Grid { blocks: [self.sequences() * self.tokens.div_ceil(STRIP), 1], threads: THREADS }
    }

    /// GPU address of memory that is allocated, used and freed on this stream, so no further
    /// synchronisation is needed.
    fn to<T>(&self, slice: &mut CudaSlice<T>) -> Argument {
        Address(slice.device_ptr_mut(&self.stream).0)
    }

    /// Launches a kernel whose first argument is the values; one kernel per dtype.
    ///
    /// # Safety
    /// As [`launch`].
    unsafe fn launch(&self, file: File, name: &str, grid: Grid, others: &[Argument]) -> Result<(), DriverError> {
        let (address, _read) = self.x.address(&self.stream);
        let arguments = [&[Address(address)], others].concat();
        // SAFETY: the caller's promise.
        unsafe { launch(&self.stream, file, &format!("{name}_{}", self.x.dtype()), grid, &arguments) }
    }
}

/// Summaries of rows and of magnitudes, on the GPU.
struct OfRows {
    order: CudaSlice<u32>,
    moments: CudaSlice<f64>,
    counts: CudaSlice<u64>,
}

/// Summaries of columns, on the GPU.
struct OfColumns {
    /// Marks of exceeding values, kept on the GPU.
    marks: CudaSlice<u32>,
    counts: CudaSlice<u32>,
    extremes: CudaSlice<f32>,
    sums: CudaSlice<f64>,
}

/// Requested statistics in transfer to the host.
#[must_use]
pub struct PendingScan {
    rows: usize,
    width: usize,
    tokens: usize,
    /// `None` without rows. Parts: rows, columns (if requested), medians.
    readback: Option<Readback>,
    /// With columns: the threshold and the marks.
    marks: Option<(f32, CudaSlice<u32>)>,
    /// With medians: their part, and the shift of their last digit.
    medians: Option<(usize, u32)>,
}

impl PendingScan {
    /// Whether the copies are complete.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn is_complete(&self) -> Result<bool, DriverError> {
        self.readback.as_ref().map_or(Ok(true), Readback::is_complete)
    }

    /// The statistics. Further requests run on a separate stream.
    /// computed beside what the GPU was asked for meanwhile.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn summary<'a>(&'a self, of: &'a Activation<'_>) -> Result<ScanSummary<'a>, DriverError> {
        assert_eq!((self.rows, self.width, self.tokens), (of.rows, of.width, of.tokens), "other activations");
        static ASIDE: StreamPerContext = StreamPerContext::new();
        let stream = ASIDE.of(of.stream.context())?;
        let &Activation { rows, width, tokens, .. } = of;
        Ok(ScanSummary { pending: self, activation: Activation { stream, x: of.x.again(), rows, width, tokens } })
    }
}

/// Statistics in the format of [`outliers_scan::Rows`]. Each method waits for the [`PendingScan`].
pub struct ScanSummary<'a> {
    pending: &'a PendingScan,
    /// A stream that does not compute the activations. They are complete when the scan is.
    activation: Activation<'a>,
}

impl ScanSummary<'_> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.pending.rows
    }

    /// Rows and magnitudes by sequence.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn scan(&self) -> Result<Vec<Scan>, DriverError> {
        let Some(readback) = &self.pending.readback else { return Ok(Vec::new()) };
        let (rows, tokens) = (self.pending.rows, self.pending.tokens);
        let (order, moments, counts) = (readback.u32s(0)?, readback.f64s(1)?, readback.u64s(2)?);
        let row = |r: usize| Row {
            max_bits: order[r],
            median: f32::from_bits(order[rows + r]),
            squares: moments[r],
            kurtosis: Some(moments[rows + r]).filter(|kurtosis| !kurtosis.is_nan()),
        };
        let sequence = |(s, counts): (usize, &[u64])| Scan {
            rows: (s * tokens..(s + 1) * tokens).map(row).collect(),
            magnitudes: Histogram::of_counts(counts),
        };
        Ok(counts.par_chunks_exact(BINS).enumerate().map(sequence).collect())
    }

    /// Columns by sequence. A value exceeds if |x| >= `threshold`, which must be the requested
    /// one.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn columns(&self, threshold: f32) -> Result<Vec<Columns>, DriverError> {
        let Some(readback) = &self.pending.readback else { return Ok(Vec::new()) };
        let (asked, marks) = self.pending.marks.as_ref().expect("columns were asked for");
        debug_assert_eq!(*asked, threshold, "another threshold than was asked for");
        let (counts, extremes, sums) = (readback.u32s(3)?, readback.f32s(4)?, readback.f64s(5)?);
        let (width, sequences) = (self.pending.width, self.activation.sequences());
        let (of_sequences, strips) = (sequences * width, self.activation.strips().blocks[0]);
        let exceeds = |dim: &usize| (0..sequences).any(|s| counts[s * width + dim] > 0);
        let listed: Vec<usize> = (0..width).filter(exceeds).collect();
        let words = self.activation.positions(marks, &listed, strips)?;

        let column = |at: usize| Column {
            count: counts[at].into(),
            positive: counts[of_sequences + at].into(),
            max: extremes[at],
            min: extremes[of_sequences + at],
            sum: sums[at],
            sum2: sums[of_sequences + at],
            sum3: sums[2 * of_sequences + at],
            sum4: sums[3 * of_sequences + at],
        };
        let sequence = |s: usize| {
            let there = listed.iter().enumerate().filter(|(_, dim)| counts[s * width + **dim] > 0);
            let each = strips / sequences;
            let mark = |(at, dim): (usize, &usize)| {
                let words = &words[at * strips + s * each..][..each];
                let pair = |pair: &[u32]| u64::from(pair[0]) | u64::from(pair.get(1).copied().unwrap_or(0)) << 32;
                ExceedingPositions { dim: *dim, positions: words.chunks(2).map(pair).collect() }
            };
            Columns { columns: (s * width..(s + 1) * width).map(column).collect(), marks: there.map(mark).collect() }
        };
        Ok((0..sequences).into_par_iter().map(sequence).collect())
    }

    /// Exact median |x| of each sequence, the lower of the two middle values. It must have been
    /// requested.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn medians(&self) -> Result<Vec<f32>, DriverError> {
        let Some(readback) = &self.pending.readback else { return Ok(Vec::new()) };
        let (part, last) = self.pending.medians.expect("medians were asked for");
        // Digits that the dtype does not have are zeros, and the lowest bit of all is none of the
        // magnitude's.
        Ok(readback.u32s(part)?.iter().map(|prefix| f32::from_bits(prefix << last >> 1)).collect())
    }

    /// Values of the listed rows whose |x| has at least the given bits, in order of rows and
    /// columns.
    ///
    /// # Errors
    /// Errors of the CUDA driver.
    pub fn large(&self, asked: &[(usize, u32)]) -> Result<Vec<Large>, DriverError> {
        self.pending.readback.as_ref().map_or(Ok(()), Readback::wait)?;
        self.activation.large(asked)
    }
}

/// Threads for a row of so many values: a power of two.
fn threads_for(width: usize) -> usize {
    (width / 8).next_power_of_two().clamp(32, THREADS)
}

#[cfg(test)]
mod tests;
