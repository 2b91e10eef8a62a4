//! NVIDIA's virtual instructions (PTX), as far as kernels of the tensor library use them.
//!
//! <https://docs.nvidia.com/cuda/parallel-thread-execution/>

mod parse;
mod run;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

pub(crate) use run::{Grid, run};

/// What numbers an instruction takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Type {
    Pred,
    /// This many bits, without a sign or without a meaning.
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

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Source {
    Register(u32),
    /// Its bits, as its instruction's type has them.
    Value(u64),
    Special(Special),
}

/// What a thread is told about itself.
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
    /// Also any address that does not say which.
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
    /// A number rather than what is none.
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
    /// True also where one is no number.
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

/// An address: a register or symbol, and what is added.
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
    /// Several registers as one, the lowest bits first.
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
    /// A product and a sum, rounded once.
    Fused {
        kind: Type,
        rounding: Rounding,
        to: u32,
        of: [Source; 3],
    },
    /// Of two numbers of 16 bits in each register.
    FusedPair {
        kind: Type,
        to: u32,
        of: [Source; 3],
    },
    /// Of integers: the lower half of the product, or all of it.
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
    /// As a number instead of a predicate.
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
    /// Until all threads of the block are there.
    Barrier,
    /// The value of the thread of the same warp whose number differs in these bits.
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
    /// What is not known here: an error if it is ever reached.
    Unknown {
        text: String,
    },
}

/// An instruction, and the predicate it depends on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Instruction {
    /// The register, and what it must be.
    pub(crate) only_if: Option<(u32, bool)>,
    pub(crate) operation: Operation,
}

/// A kernel, ready to run.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    /// Bytes of each parameter, and where it begins among all.
    pub(crate) parameters: Vec<(usize, usize)>,
    pub(crate) registers: usize,
    /// Bytes shared by the threads of a block, without what a launch adds.
    pub(crate) shared: usize,
    /// Bytes of each thread.
    pub(crate) local: usize,
    pub(crate) code: Vec<Instruction>,
}

/// The kernels of a file by their names, each parsed when it is first asked for.
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

    /// `None`: there is no such kernel.
    pub(crate) fn kernel(&self, name: &str) -> Option<Kernel> {
        let range = self.kernels.get(name)?;
        Some(parse::kernel(name, &self.text[range.clone()], &self.added))
    }
}
