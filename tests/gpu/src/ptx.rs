//! The PTX instructions that the worker's kernels use.
//!
//! <https://docs.nvidia.com/cuda/parallel-thread-execution/>

mod parse;
mod run;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

pub(crate) use run::{Grid, run};

/// Type of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    Pred,
    /// Untyped or unsigned, with this many bits.
    U(u32),
    S(u32),
    F16,
    Bf16,
    F32,
    F64,
}

impl Type {
    pub(crate) fn bits(self) -> u32 {
        match self {
            Self::Pred => 1,
            Self::U(bits) | Self::S(bits) => bits,
            Self::F16 | Self::Bf16 => 16,
            Self::F32 => 32,
            Self::F64 => 64,
        }
    }

    pub(crate) fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }
}

/// An operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Source {
    Register(u32),
    /// A constant, as bits of the instruction's type.
    Value(u64),
    Special(Special),
}

/// A special register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    /// Of x, y, z.
    Thread(usize),
    Block(usize),
    BlockSize(usize),
    GridSize(usize),
    Lane,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// Also generic addresses.
    Global,
    Shared,
    Local,
    Parameters,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    Nearest,
    Zero,
    Down,
    Up,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Two {
    Add,
    Sub,
    Mul,
    MulHigh,
    MulWide,
    Div,
    Rem,
    /// A number in preference to NaN.
    Min,
    Max,
    MinNan,
    MaxNan,
    And,
    Or,
    Xor,
    Shl,
    Shr,
    CopySign,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum One {
    Neg,
    Abs,
    Not,
    Exp2,
    Log2,
    Reciprocal,
    Sqrt,
    ReciprocalSqrt,
    Sin,
    Cos,
    Tanh,
    LeadingZeros,
    Population,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Comparison {
    pub(crate) order: Order,
    /// Also true for NaN.
    pub(crate) or_unordered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Atomic {
    Add,
    Max,
    CompareAndSwap,
}

/// An address: a register or symbol, and an offset.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Address {
    pub(crate) base: Source,
    pub(crate) offset: i64,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operation {
    Move {
        to: u32,
        of: Source,
    },
    /// Packs several registers into one, lowest bits first.
    Pack {
        to: u32,
        of: Vec<Source>,
        bits: u32,
    },
    Unpack {
        to: Vec<Option<u32>>,
        of: Source,
        bits: u32,
    },
    One {
        what: One,
        kind: Type,
        to: u32,
        of: Source,
    },
    Two {
        what: Two,
        kind: Type,
        rounding: Rounding,
        to: u32,
        of: [Source; 2],
    },
    /// Fused multiply-add, rounded once.
    Fused {
        kind: Type,
        rounding: Rounding,
        to: u32,
        of: [Source; 3],
    },
    /// On two 16-bit numbers in each register.
    FusedPair {
        kind: Type,
        to: u32,
        of: [Source; 3],
    },
    /// Integer product: the lower half, or all of it.
    MulAdd {
        kind: Type,
        wide: bool,
        to: u32,
        of: [Source; 3],
    },
    Compare {
        what: Comparison,
        kind: Type,
        to: u32,
        of: [Source; 2],
    },
    /// Sets a register instead of a predicate.
    Set {
        what: Comparison,
        kind: Type,
        result: Type,
        to: u32,
        of: [Source; 2],
    },
    Select {
        to: u32,
        of: [Source; 2],
        by: Source,
    },
    Convert {
        from: Type,
        into: Type,
        rounding: Rounding,
        to_integer: bool,
        saturated: bool,
        to: u32,
        of: Source,
    },
    Load {
        space: Space,
        kind: Type,
        to: Vec<u32>,
        from: Address,
    },
    Store {
        space: Space,
        kind: Type,
        at: Address,
        of: Vec<Source>,
    },
    Atomic {
        what: Atomic,
        space: Space,
        kind: Type,
        to: u32,
        at: Address,
        of: Vec<Source>,
    },
    Jump {
        to: usize,
    },
    /// Barrier of a block.
    Barrier,
    /// Exchange within a warp: with the thread whose index differs in these bits.
    Butterfly {
        to: u32,
        of: Source,
        lanes: Source,
    },
    /// Two numbers as two of 16 bits in one register, the first in the lower half.
    ConvertPair {
        into: Type,
        to: u32,
        of: [Source; 2],
    },
    /// From global to shared memory: so many bytes, of which those beyond `there` are zeros.
    CopyLater {
        to: Address,
        from: Address,
        bytes: usize,
        there: Option<Source>,
    },
    /// The copies that were asked for since the last of these are a group.
    GroupCopies,
    /// Until all groups but so many of the last ones are there.
    AwaitCopies {
        but: usize,
    },
    /// A matrix of eight rows of 16 bytes for each register; the warp's threads have the rows'
    /// addresses.
    LoadMatrices {
        transposed: bool,
        to: Vec<u32>,
        from: Address,
    },
    /// A product of 16 x 16 and 16 x 8 numbers, and 16 x 8 that are added in f32, all of them
    /// spread over the warp's threads.
    MultiplyMatrices {
        kind: Type,
        to: Vec<u32>,
        of: [Vec<Source>; 3],
    },
    End,
    /// An unsupported instruction: an error when it is executed.
    Unknown {
        text: String,
    },
}

/// An instruction and its predicate.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Instruction {
    /// The register and its required value.
    pub(crate) only_if: Option<(u32, bool)>,
    pub(crate) operation: Operation,
}

/// A parsed kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    /// Size and offset of each parameter.
    pub(crate) parameters: Vec<(usize, usize)>,
    pub(crate) registers: usize,
    /// Bytes of shared memory, without a launch's dynamic part.
    pub(crate) shared: usize,
    /// Bytes of local memory per thread.
    pub(crate) local: usize,
    pub(crate) code: Vec<Instruction>,
}

/// The kernels of a file by name, each parsed on first use.
pub(crate) struct Module {
    text: String,
    /// What the memory is called that launches add to what blocks share.
    added: Vec<String>,
    /// Where each one's text lies.
    kernels: HashMap<String, std::ops::Range<usize>>,
}

impl Module {
    /// Finds the kernels of a file.
    pub(crate) fn new(text: String) -> Self {
        let (added, kernels) = (parse::added_by_launch(&text), parse::kernels(&text));
        Self { text, added, kernels }
    }

    /// `None` without a kernel of this name.
    pub(crate) fn kernel(&self, name: &str) -> Option<Kernel> {
        let range = self.kernels.get(name)?;
        Some(parse::kernel(name, &self.text[range.clone()], &self.added))
    }
}
