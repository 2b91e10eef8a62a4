//! Runs a kernel: block after block, and each thread until all wait at a barrier.

use half::{bf16, f16};

use super::{
    Address, Atomic, Comparison, Instruction, Kernel, One, Operation, Order, Rounding, Source, Space, Special, Two,
    Type,
};
use crate::memory::Memory;

/// Blocks and threads along x, y, z; bytes of dynamic shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: [u32; 3],
    pub(crate) shared: usize,
}

/// Threads of a warp.
const WARP: usize = 32;

/// Runs all blocks of a kernel.
///
/// # Errors
/// An unsupported instruction, an address outside of allocated memory, or threads that wait for
/// ended ones; with the kernel's name.
pub(crate) fn run(kernel: &Kernel, grid: Grid, parameters: &[u8], memory: &Memory) -> Result<(), String> {
    let [x, y, z] = grid.blocks;
    let count = grid.threads.iter().product::<u32>() as usize;
    let mut block = Block {
        kernel,
        grid,
        parameters,
        memory: memory.reader(),
        shared: vec![0; kernel.shared.next_multiple_of(16) + grid.shared],
        threads: (0..count).map(|_| Thread::new(kernel)).collect(),
        number: [0; 3],
    };
    for number in (0..z).flat_map(|z| (0..y).flat_map(move |y| (0..x).map(move |x| [x, y, z]))) {
        block.number = number;
        block.run().map_err(|why| format!("kernel {}: {why}", kernel.name))?;
    }
    Ok(())
}

/// State of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ThreadState {
    Runs,
    /// At a barrier before this instruction.
    AtBarrier,
    /// At an exchange within its warp.
    AtExchange,
    Ended,
}

struct Thread {
    registers: Vec<u64>,
    local: Vec<u8>,
    at: usize,
    standing: ThreadState,
    /// Copies that are in no group yet.
    asked: Vec<LateCopy>,
    /// Those that are, none of which is done before it is waited for.
    groups: Vec<Vec<LateCopy>>,
}

/// From global to shared memory, with zeros behind what is there.
struct LateCopy {
    to: u64,
    from: u64,
    bytes: usize,
    there: usize,
}

impl Thread {
    fn new(kernel: &Kernel) -> Self {
        Self {
            registers: vec![0; kernel.registers],
            local: vec![0; kernel.local],
            at: 0,
            standing: ThreadState::Runs,
            asked: Vec::new(),
            groups: Vec::new(),
        }
    }
}

struct Block<'a> {
    kernel: &'a Kernel,
    grid: Grid,
    parameters: &'a [u8],
    memory: crate::memory::Reader<'a>,
    shared: Vec<u8>,
    threads: Vec<Thread>,
    number: [u32; 3],
}

impl Block<'_> {
    fn run(&mut self) -> Result<(), String> {
        for thread in &mut self.threads {
            (thread.at, thread.standing) = (0, ThreadState::Runs);
            thread.asked.clear();
            thread.groups.clear();
        }
        let mut threads = std::mem::take(&mut self.threads);
        let outcome = self.run_all(&mut threads);
        self.threads = threads;
        outcome
    }

    fn run_all(&mut self, threads: &mut [Thread]) -> Result<(), String> {
        loop {
            for (number, thread) in threads.iter_mut().enumerate() {
                if thread.standing == ThreadState::Runs {
                    self.advance(number, thread)?;
                }
            }
            let mut exchanged = false;
            for (warp, lanes) in threads.chunks_mut(WARP).enumerate() {
                exchanged |= self.exchange(warp, lanes)?;
            }
            if exchanged {
                continue;
            }
            let waiting = threads.iter().filter(|thread| thread.standing == ThreadState::AtBarrier).count();
            match waiting {
                0 => return Ok(()),
                _ if threads.iter().any(|thread| thread.standing == ThreadState::AtExchange) => {
                    return Err("threads wait for a barrier while others wait for their warp".to_owned());
                }
                _ => threads.iter_mut().filter(|thread| thread.standing == ThreadState::AtBarrier).for_each(|thread| {
                    thread.at += 1;
                    thread.standing = ThreadState::Runs;
                }),
            }
        }
    }

    /// Exchanges values within a warp, if all running threads wait for it.
    fn exchange(&self, warp: usize, lanes: &mut [Thread]) -> Result<bool, String> {
        let mut asking = lanes.iter().filter(|thread| thread.standing != ThreadState::Ended);
        let Some(at) = asking.next().filter(|first| first.standing == ThreadState::AtExchange).map(|first| first.at)
        else {
            return Ok(false);
        };
        if !asking.all(|thread| thread.standing == ThreadState::AtExchange && thread.at == at) {
            return Ok(false);
        }
        match &self.kernel.code[at].operation {
            Operation::Butterfly { to, of, lanes: mask } => {
                let values = self.of_warp(warp, lanes, std::slice::from_ref(of));
                for lane in 0..lanes.len() {
                    let number = warp * WARP + lane;
                    let other = lane ^ self.value(number, &lanes[lane], *mask) as usize;
                    // Outside of the warp: its own.
                    let value = *values.get(other).unwrap_or(&values[lane]);
                    let thread = &mut lanes[lane];
                    if thread.standing == ThreadState::AtExchange {
                        thread.registers[*to as usize] = value;
                    }
                }
            }
            Operation::LoadMatrices { transposed, to, from } => {
                self.load_matrices(warp, whole_warp(lanes)?, *transposed, to, from)?;
            }
            Operation::MultiplyMatrices { kind, to, of } => {
                self.multiply_matrices(warp, whole_warp(lanes)?, *kind, to, of);
            }
            _ => return Err("an exchange that is none".to_owned()),
        }
        for thread in lanes.iter_mut().filter(|thread| thread.standing == ThreadState::AtExchange) {
            thread.at += 1;
            thread.standing = ThreadState::Runs;
        }
        Ok(true)
    }

    /// What each thread of a warp has of these, one thread after another.
    fn of_warp(&self, warp: usize, lanes: &[Thread], of: &[Source]) -> Vec<u64> {
        let threads = lanes.iter().enumerate();
        threads
            .flat_map(|(lane, thread)| of.iter().map(move |source| self.value(warp * WARP + lane, thread, *source)))
            .collect()
    }

    /// Gives thread i of each matrix two neighbours in row i / 4, from column 2 (i % 4) on; of a
    /// transposed one, the same of the columns.
    fn load_matrices(
        &self,
        warp: usize,
        lanes: &mut [Thread],
        transposed: bool,
        to: &[u32],
        from: &Address,
    ) -> Result<(), String> {
        let mut rows = Vec::new();
        for (lane, thread) in lanes.iter().enumerate().take(8 * to.len()) {
            let at = self.address(warp * WARP + lane, thread, from) as usize;
            let row = self.shared.get(at..at + 16).filter(|_| at.is_multiple_of(16));
            rows.push(row.ok_or_else(|| format!("no row of a matrix can be at {at} of shared memory"))?);
        }
        for (lane, thread) in lanes.iter_mut().enumerate() {
            for (matrix, register) in to.iter().enumerate() {
                let number = |i: usize| {
                    let (major, minor) = (lane / 4, lane % 4 * 2 + i);
                    let (row, column) = if transposed { (minor, major) } else { (major, minor) };
                    little_endian(&rows[8 * matrix + row][2 * column..][..2])
                };
                thread.registers[*register as usize] = number(0) | number(1) << 16;
            }
        }
        Ok(())
    }

    /// Thread i has rows i / 4 and 8 further of the first factor and of the sum, column i / 4 of
    /// the second; of these the two columns, or rows, from 2 (i % 4) on, and of factors those 8
    /// further. The lower half of a register is the first of two.
    fn multiply_matrices(&self, warp: usize, lanes: &mut [Thread], kind: Type, to: &[u32], of: &[Vec<Source>; 3]) {
        let [left, right, added] = of.each_ref().map(|of| self.of_warp(warp, lanes, of));
        let half = |register: u64, k: usize| float(kind, register >> (16 * (k % 2)) & 0xffff);
        // By row and by column: 16 products each.
        let left: Vec<f64> = (0..16 * 16)
            .map(|i| (i / 16, i % 16))
            .map(|(row, k)| half(left[4 * (row % 8 * 4 + k % 8 / 2) + k / 8 * 2 + row / 8], k))
            .collect();
        let right: Vec<f64> = (0..8 * 16)
            .map(|i| (i / 16, i % 16))
            .map(|(column, k)| half(right[2 * (column * 4 + k % 8 / 2) + k / 8], k))
            .collect();
        for (lane, thread) in lanes.iter_mut().enumerate() {
            for (i, register) in to.iter().enumerate() {
                let (row, column) = (lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
                let factors = left[16 * row..][..16].iter().zip(&right[16 * column..][..16]);
                let sum = factors.fold(float(Type::F32, added[4 * lane + i]), |sum, (a, b)| sum + a * b);
                thread.registers[*register as usize] = float_bits(Type::F32, sum);
            }
        }
    }

    fn value(&self, number: usize, thread: &Thread, source: Source) -> u64 {
        match source {
            Source::Register(register) => thread.registers[register as usize],
            Source::Value(value) => value,
            Source::Special(special) => {
                let [x, y, _] = self.grid.threads.map(|n| n as usize);
                let place = [number % x, number / x % y, number / (x * y)];
                match special {
                    Special::Thread(axis) => place[axis] as u64,
                    Special::Block(axis) => self.number[axis].into(),
                    Special::BlockSize(axis) => self.grid.threads[axis].into(),
                    Special::GridSize(axis) => self.grid.blocks[axis].into(),
                    Special::Lane => (number % WARP) as u64,
                }
            }
        }
    }

    /// Runs until the thread waits or ends.
    fn advance(&mut self, number: usize, thread: &mut Thread) -> Result<(), String> {
        let kernel = self.kernel;
        while let Some(Instruction { only_if, operation }) = kernel.code.get(thread.at) {
            if only_if.is_some_and(|(predicate, wanted)| (thread.registers[predicate as usize] != 0) != wanted) {
                thread.at += 1;
                continue;
            }
            match operation {
                Operation::Barrier => {
                    thread.standing = ThreadState::AtBarrier;
                    return Ok(());
                }
                Operation::Butterfly { .. } | Operation::LoadMatrices { .. } | Operation::MultiplyMatrices { .. } => {
                    thread.standing = ThreadState::AtExchange;
                    return Ok(());
                }
                Operation::End => break,
                Operation::Jump { to } => {
                    thread.at = *to;
                    continue;
                }
                other => self.step(number, thread, other)?,
            }
            thread.at += 1;
        }
        thread.standing = ThreadState::Ended;
        Ok(())
    }

    fn step(&mut self, number: usize, thread: &mut Thread, operation: &Operation) -> Result<(), String> {
        let read = |thread: &Thread, source: &Source| self.value(number, thread, *source);
        let (to, value) = match operation {
            Operation::Move { to, of } => (*to, read(thread, of)),
            Operation::Pack { to, of, bits } => {
                let of = of.iter().enumerate();
                let mask = (1 << bits) - 1;
                (*to, of.fold(0, |all, (i, part)| all | (read(thread, part) & mask) << (i as u32 * bits)))
            }
            Operation::Unpack { to, of, bits } => {
                let all = read(thread, of);
                for (i, register) in to.iter().enumerate() {
                    if let Some(register) = register {
                        thread.registers[*register as usize] = all >> (i as u32 * bits) & ((1 << bits) - 1);
                    }
                }
                return Ok(());
            }
            Operation::One { what, kind, to, of } => (*to, one(*what, *kind, read(thread, of))),
            Operation::Two { what, kind, rounding, to, of: [a, b] } => {
                (*to, two(*what, *kind, *rounding, read(thread, a), read(thread, b))?)
            }
            Operation::Fused { kind, rounding, to, of } => {
                let [a, b, c] = [&of[0], &of[1], &of[2]].map(|of| float(*kind, read(thread, of)));
                let value = match kind {
                    Type::F32 if *rounding == Rounding::Nearest => f64::from((a as f32).mul_add(b as f32, c as f32)),
                    // Of two of 24 bits the product is exact.
                    Type::F32 => rounded_to_f32(a * b + c, *rounding),
                    Type::F64 => a.mul_add(b, c),
                    _ => a * b + c,
                };
                (*to, float_bits(*kind, value))
            }
            Operation::FusedPair { kind, to, of } => {
                let of = [&of[0], &of[1], &of[2]].map(|of| read(thread, of));
                let half = |shift: u32| {
                    let [a, b, c] = of.map(|of| float(*kind, of >> shift & 0xffff));
                    float_bits(*kind, a * b + c) << shift
                };
                (*to, half(0) | half(16))
            }
            Operation::MulAdd { kind, wide, to, of } => {
                let [a, b, c] = [&of[0], &of[1], &of[2]].map(|of| read(thread, of));
                let product = match wide {
                    true => two(Two::MulWide, *kind, Rounding::Nearest, a, b)?,
                    false => two(Two::Mul, *kind, Rounding::Nearest, a, b)?,
                };
                let bits = if *wide { 2 * kind.bits() } else { kind.bits() };
                (*to, product.wrapping_add(c) & mask(bits))
            }
            Operation::Compare { what, kind, to, of: [a, b] } => {
                (*to, compare(*what, *kind, read(thread, a), read(thread, b)).into())
            }
            Operation::Set { what, kind, result, to, of: [a, b] } => {
                let holds = compare(*what, *kind, read(thread, a), read(thread, b));
                let value = match (holds, result.is_float()) {
                    (true, true) => float_bits(*result, 1.0),
                    (true, false) => mask(result.bits()),
                    (false, _) => 0,
                };
                (*to, value)
            }
            Operation::Select { to, of: [a, b], by } => {
                (*to, if read(thread, by) != 0 { read(thread, a) } else { read(thread, b) })
            }
            Operation::Convert { from, into, rounding, to_integer, saturated, to, of } => {
                let value = read(thread, of);
                (*to, convert(*from, *into, *rounding, *to_integer, *saturated, value))
            }
            Operation::Load { space, kind, to, from } => {
                let bytes = kind.bits() as usize / 8;
                let at = self.address(number, thread, from);
                for (i, register) in to.iter().enumerate() {
                    let at = at.wrapping_add((i * bytes) as u64);
                    let value = self.load(thread, *space, at, bytes)?;
                    let extended = if let Type::S(bits) = kind { signed(value, *bits) as u64 } else { value };
                    thread.registers[*register as usize] = extended;
                }
                return Ok(());
            }
            Operation::Store { space, kind, at, of } => {
                let bytes = kind.bits() as usize / 8;
                let at = self.address(number, thread, at);
                let values: Vec<u64> = of.iter().map(|of| read(thread, of)).collect();
                for (i, value) in values.into_iter().enumerate() {
                    self.store(thread, *space, at.wrapping_add((i * bytes) as u64), bytes, value)?;
                }
                return Ok(());
            }
            Operation::Atomic { what, space, kind, to, at, of } => {
                let bytes = kind.bits() as usize / 8;
                let at = self.address(number, thread, at);
                let of: Vec<u64> = of.iter().map(|of| read(thread, of)).collect();
                // Kernels of a stream run one after the other, as do blocks and threads here, so
                // the operation is atomic.
                let old = self.load(thread, *space, at, bytes)?;
                let new = match (what, of.as_slice()) {
                    (Atomic::Add, [value]) => two(Two::Add, *kind, Rounding::Nearest, old, *value)?,
                    (Atomic::Max, [value]) => two(Two::Max, *kind, Rounding::Nearest, old, *value)?,
                    (Atomic::CompareAndSwap, [expected, value]) if old == *expected & mask(kind.bits()) => *value,
                    (Atomic::CompareAndSwap, [_, _]) => old,
                    _ => return Err("an atomic operation with other operands".to_owned()),
                };
                self.store(thread, *space, at, bytes, new)?;
                (*to, old)
            }
            Operation::ConvertPair { into, to, of: [low, high] } => {
                let [low, high] = [low, high].map(|of| float_bits(*into, float(Type::F32, read(thread, of))));
                (*to, low | high << 16)
            }
            Operation::CopyLater { to, from, bytes, there } => {
                let there = there.as_ref().map_or(*bytes, |there| (read(thread, there) as usize).min(*bytes));
                let (to, from) = (self.address(number, thread, to), self.address(number, thread, from));
                thread.asked.push(LateCopy { to, from, bytes: *bytes, there });
                return Ok(());
            }
            Operation::GroupCopies => {
                let group = std::mem::take(&mut thread.asked);
                thread.groups.push(group);
                return Ok(());
            }
            Operation::AwaitCopies { but } => {
                let due = thread.groups.len().saturating_sub(*but);
                return thread.groups.drain(..due).flatten().try_for_each(|copy| self.copy(&copy));
            }
            Operation::Unknown { text } => return Err(format!("`{text}` is not known")),
            Operation::Jump { .. }
            | Operation::Barrier
            | Operation::Butterfly { .. }
            | Operation::LoadMatrices { .. }
            | Operation::MultiplyMatrices { .. }
            | Operation::End => return Err("an instruction in the wrong place".to_owned()),
        };
        thread.registers[to as usize] = value;
        Ok(())
    }

    fn copy(&mut self, copy: &LateCopy) -> Result<(), String> {
        let LateCopy { to, from, bytes, there } = *copy;
        let mut value = [0; 16];
        if there > 0 {
            self.memory.read(from, &mut value[..there])?;
        }
        let is_aligned = (to | from).is_multiple_of(bytes as u64);
        let room = self.shared.get_mut(to as usize..to as usize + bytes).filter(|_| is_aligned);
        room.ok_or_else(|| format!("{bytes} bytes at {from:#x} cannot be copied to {to} of shared memory"))?
            .copy_from_slice(&value[..bytes]);
        Ok(())
    }

    fn address(&self, number: usize, thread: &Thread, address: &Address) -> u64 {
        self.value(number, thread, address.base).wrapping_add(address.offset as u64)
    }

    fn load(&mut self, thread: &Thread, space: Space, at: u64, bytes: usize) -> Result<u64, String> {
        let of = |all: &[u8]| all.get(at as usize..at as usize + bytes).map(little_endian);
        let outside = || format!("{bytes} bytes at {at} of {space:?} memory are outside of it");
        match space {
            Space::Parameters => of(self.parameters).ok_or_else(outside),
            Space::Shared => of(&self.shared).ok_or_else(outside),
            Space::Local => of(&thread.local).ok_or_else(outside),
            Space::Global => {
                let mut value = [0; 8];
                self.memory.read(at, &mut value[..bytes])?;
                Ok(u64::from_le_bytes(value))
            }
        }
    }

    fn store(&mut self, thread: &mut Thread, space: Space, at: u64, bytes: usize, value: u64) -> Result<(), String> {
        let value = &value.to_le_bytes()[..bytes];
        let all = match space {
            Space::Global => return self.memory.write(at, value),
            Space::Shared => &mut self.shared,
            Space::Local => &mut thread.local,
            Space::Parameters => return Err("a parameter is written to".to_owned()),
        };
        let place = all.get_mut(at as usize..at as usize + bytes);
        place
            .ok_or_else(|| format!("{bytes} bytes at {at} of {space:?} memory are outside of it"))?
            .copy_from_slice(value);
        Ok(())
    }
}

/// All threads of a warp, which some instructions need.
fn whole_warp(lanes: &mut [Thread]) -> Result<&mut [Thread], String> {
    match lanes.iter().filter(|thread| thread.standing == ThreadState::AtExchange).count() {
        WARP => Ok(lanes),
        some => Err(format!("{some} threads of a warp share matrices")),
    }
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Mask of the lowest bits.
fn mask(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

fn signed(value: u64, bits: u32) -> i64 {
    (value << (64 - bits)) as i64 >> (64 - bits)
}

/// A float of a type, exactly.
fn float(kind: Type, bits: u64) -> f64 {
    match kind {
        Type::F16 => f16::from_bits(bits as u16).to_f64(),
        Type::Bf16 => bf16::from_bits(bits as u16).to_f64(),
        Type::F32 => f32::from_bits(bits as u32).into(),
        _ => f64::from_bits(bits),
    }
}

/// Rounded to nearest.
fn float_bits(kind: Type, value: f64) -> u64 {
    match kind {
        Type::F16 => f16::from_f32(to_odd(value)).to_bits().into(),
        Type::Bf16 => bf16::from_f32(to_odd(value)).to_bits().into(),
        Type::F32 => (value as f32).to_bits().into(),
        _ => value.to_bits(),
    }
}

/// An f32 that rounds to 16 bits as `value` does: truncated, with the lowest bit set if bits were
/// lost. (The library's conversions from f64 drop the lower 32 bits.)
fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || !value.is_finite() {
        return nearest;
    }
    let is_above = f64::from(nearest).abs() > value.abs();
    f32::from_bits((nearest.to_bits() - u32::from(is_above)) | 1)
}

/// An f32 with another rounding mode.
fn rounded_to_f32(value: f64, rounding: Rounding) -> f64 {
    let nearest = value as f32;
    let wrong = match rounding {
        Rounding::Nearest => false,
        Rounding::Down => f64::from(nearest) > value,
        Rounding::Up => f64::from(nearest) < value,
        Rounding::Zero => f64::from(nearest).abs() > value.abs(),
    };
    let corrected = match (wrong, rounding) {
        (false, _) => nearest,
        (true, Rounding::Down) => nearest.next_down(),
        (true, Rounding::Up) => nearest.next_up(),
        (true, _) if nearest > 0.0 => nearest.next_down(),
        (true, _) => nearest.next_up(),
    };
    corrected.into()
}

fn one(what: One, kind: Type, bits: u64) -> u64 {
    let width = kind.bits();
    if kind.is_float() {
        let sign = 1 << (width - 1);
        let x = float(kind, bits);
        let value = match what {
            One::Neg => return bits ^ sign,
            One::Abs => return bits & !sign,
            One::Exp2 => x.exp2(),
            One::Log2 => x.log2(),
            One::Reciprocal => 1.0 / x,
            One::Sqrt => x.sqrt(),
            One::ReciprocalSqrt => 1.0 / x.sqrt(),
            One::Sin => x.sin(),
            One::Cos => x.cos(),
            One::Tanh => x.tanh(),
            One::Not | One::LeadingZeros | One::Population => f64::NAN,
        };
        return float_bits(kind, value);
    }
    let value = match what {
        One::Neg => bits.wrapping_neg(),
        One::Abs => signed(bits, width).unsigned_abs(),
        One::Not => !bits,
        One::LeadingZeros => u64::from((bits & mask(width)).leading_zeros() - (64 - width)),
        One::Population => (bits & mask(width)).count_ones().into(),
        _ => 0,
    };
    value & mask(width)
}

fn two(what: Two, kind: Type, rounding: Rounding, a: u64, b: u64) -> Result<u64, String> {
    if kind.is_float() {
        return Ok(two_floats(what, kind, rounding, a, b));
    }
    let bits = kind.bits();
    let is_signed = matches!(kind, Type::S(_));
    let (ua, ub) = (a & mask(bits), b & mask(bits));
    let (sa, sb) = (signed(a, bits), signed(b, bits));
    let value = match what {
        Two::Add => ua.wrapping_add(ub),
        Two::Sub => ua.wrapping_sub(ub),
        Two::Mul => ua.wrapping_mul(ub),
        Two::MulWide if is_signed => return Ok(sa.wrapping_mul(sb) as u64 & mask(2 * bits)),
        Two::MulWide => return Ok(ua.wrapping_mul(ub) & mask(2 * bits)),
        Two::MulHigh if is_signed => ((i128::from(sa) * i128::from(sb)) >> bits) as u64,
        Two::MulHigh => ((u128::from(ua) * u128::from(ub)) >> bits) as u64,
        Two::Div | Two::Rem if ub == 0 => return Err("a division by zero".to_owned()),
        Two::Div if is_signed => sa.wrapping_div(sb) as u64,
        Two::Div => ua / ub,
        Two::Rem if is_signed => sa.wrapping_rem(sb) as u64,
        Two::Rem => ua % ub,
        Two::Min | Two::MinNan if is_signed => sa.min(sb) as u64,
        Two::Min | Two::MinNan => ua.min(ub),
        Two::Max | Two::MaxNan if is_signed => sa.max(sb) as u64,
        Two::Max | Two::MaxNan => ua.max(ub),
        Two::And => ua & ub,
        Two::Or => ua | ub,
        Two::Xor => ua ^ ub,
        Two::Shl => ua.checked_shl(b as u32).unwrap_or(0),
        Two::Shr if is_signed => (sa >> (b as u32).min(bits - 1)) as u64,
        Two::Shr => ua.checked_shr(b as u32).unwrap_or(0),
        Two::CopySign => return Err("a sign of an integer".to_owned()),
    };
    Ok(value & mask(bits))
}

fn two_floats(what: Two, kind: Type, rounding: Rounding, a: u64, b: u64) -> u64 {
    let (x, y) = (float(kind, a), float(kind, b));
    let value = match what {
        Two::Add => x + y,
        Two::Sub => x - y,
        Two::Mul => x * y,
        Two::Div => x / y,
        Two::Min => x.min(y),
        Two::Max => x.max(y),
        Two::MinNan | Two::MaxNan if x.is_nan() || y.is_nan() => f64::NAN,
        Two::MinNan => x.min(y),
        Two::MaxNan => x.max(y),
        // The sign of the first operand, with the magnitude of the second.
        Two::CopySign => {
            let sign = 1 << (kind.bits() - 1);
            return a & sign | b & !sign;
        }
        _ => f64::NAN,
    };
    match (kind, rounding) {
        (Type::F32, Rounding::Down | Rounding::Up | Rounding::Zero) => {
            float_bits(kind, rounded_to_f32(value, rounding))
        }
        _ => float_bits(kind, value),
    }
}

fn compare(what: Comparison, kind: Type, a: u64, b: u64) -> bool {
    use std::cmp::Ordering;
    let order = if kind.is_float() {
        float(kind, a).partial_cmp(&float(kind, b))
    } else if let Type::S(bits) = kind {
        Some(signed(a, bits).cmp(&signed(b, bits)))
    } else {
        let mask = mask(kind.bits());
        Some((a & mask).cmp(&(b & mask)))
    };
    let Some(order) = order else { return what.or_unordered };
    match what.order {
        Order::Eq => order == Ordering::Equal,
        Order::Ne => order != Ordering::Equal,
        Order::Lt => order == Ordering::Less,
        Order::Le => order != Ordering::Greater,
        Order::Gt => order == Ordering::Greater,
        Order::Ge => order != Ordering::Less,
    }
}

fn whole(value: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest => value.round_ties_even(),
        Rounding::Zero => value.trunc(),
        Rounding::Down => value.floor(),
        Rounding::Up => value.ceil(),
    }
}

fn convert(from: Type, into: Type, rounding: Rounding, to_integer: bool, saturated: bool, bits: u64) -> u64 {
    match (from.is_float(), into.is_float()) {
        (true, true) => {
            let value = float(from, bits);
            let value = if to_integer { whole(value, rounding) } else { value };
            let value = match saturated {
                true if value.is_nan() => 0.0,
                true => value.clamp(0.0, 1.0),
                false => value,
            };
            match (into, rounding) {
                (Type::F32, Rounding::Nearest) | (Type::F16 | Type::Bf16 | Type::F64, _) => float_bits(into, value),
                _ => float_bits(into, rounded_to_f32(value, rounding)),
            }
        }
        (true, false) => {
            let value = whole(float(from, bits), rounding);
            let width = into.bits();
            let converted = match into {
                Type::S(_) => {
                    let limit = 2f64.powi(width as i32 - 1);
                    value.clamp(-limit, limit) as i64 as u64
                }
                _ if width == 64 => value as u64,
                _ => (value as u64).min(mask(width)),
            };
            let at_most = if let Type::S(bits) = into { mask(bits - 1) } else { mask(width) };
            // The limit itself is out of range.
            let converted =
                if value >= 2f64.powi(width as i32 - 1) && matches!(into, Type::S(_)) { at_most } else { converted };
            converted & mask(width)
        }
        (false, true) => {
            let exact = match from {
                Type::S(width) => signed(bits, width) as i128,
                _ => i128::from(bits & mask(from.bits())),
            };
            match (into, rounding) {
                (Type::F32, Rounding::Nearest) => u64::from((exact as f32).to_bits()),
                (Type::F32, _) => float_bits(into, rounded_to_f32(exact as f64, rounding)),
                _ => float_bits(into, exact as f64),
            }
        }
        (false, false) => {
            let value = if let Type::S(width) = from { signed(bits, width) as u64 } else { bits & mask(from.bits()) };
            value & mask(into.bits())
        }
    }
}
