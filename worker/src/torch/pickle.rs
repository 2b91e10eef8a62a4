//! A pickle machine that knows tensors and nothing else.
//!
//! Pickles are programs for a stack machine whose dangerous instructions name Python functions and call them. This one
//! knows the few names that a dictionary of tensors needs and refuses every other by name; nothing is ever called. Values
//! that hold others are kept in tables and referred to by number, so that remembering and nesting, which a hostile
//! pickle can do a million times over, cost one number each.

use std::collections::HashMap;

use super::bytes::Bytes;
use super::damaged;
use crate::error::{Result, WorkerError};
use crate::safetensors::{StoredDtype, shown};

/// Most dimensions of a tensor.
const MAX_RANK: usize = 16;
/// Longest name of a storage; real ones are numbers.
const MAX_KEY: usize = 64;

/// PyTorch's names for typed storages.
static STORAGES: [(&str, StoredDtype); 10] = [
    ("DoubleStorage", StoredDtype::F64),
    ("FloatStorage", StoredDtype::F32),
    ("HalfStorage", StoredDtype::F16),
    ("BFloat16Storage", StoredDtype::BF16),
    ("LongStorage", StoredDtype::I64),
    ("IntStorage", StoredDtype::I32),
    ("ShortStorage", StoredDtype::I16),
    ("CharStorage", StoredDtype::I8),
    ("ByteStorage", StoredDtype::U8),
    ("BoolStorage", StoredDtype::Bool),
];

/// The values of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Storage<'p> {
    pub(super) dtype: &'static StoredDtype,
    /// Name of its record.
    pub(super) key: &'p str,
    /// Number of values.
    pub(super) values: u64,
}

/// A tensor: part of a storage, seen in a shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View<'p> {
    pub(super) name: &'p str,
    pub(super) storage: Storage<'p>,
    /// Its first value's place in the storage.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    /// Values from one index to the next, per dimension; as many as in `shape`.
    pub(super) strides: Vec<u64>,
}

impl View<'_> {
    fn dims(&self) -> impl DoubleEndedIterator<Item = (u64, u64)> + '_ {
        self.shape.iter().copied().zip(self.strides.iter().copied())
    }

    /// Values from its first to its last, both included; `None` on overflow.
    pub(super) fn span(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        self.dims().try_fold(1_u64, |span, (dim, stride)| span.checked_add((dim - 1).checked_mul(stride)?))
    }

    /// Whether its values lie one after another in row-major order.
    pub(super) fn is_contiguous(&self) -> bool {
        let step = |expected: u64, (dim, stride): (u64, u64)| match dim {
            1 => Some(expected),
            dim if stride == expected => expected.checked_mul(dim),
            _ => None,
        };
        self.shape.contains(&0) || self.dims().rev().try_fold(1, step).is_some()
    }
}

/// The tensors of a pickled `state_dict`, in its order. Entries that are no tensors are left out.
pub(super) fn state_dict(program: &[u8]) -> Result<Vec<View<'_>>> {
    let mut machine = Machine::default();
    let top = machine.run(Bytes(program))?;
    let Value::Dict(entries) = top else {
        return Err(WorkerError::checkpoint("its pickle is not a dictionary of tensors")
            .hint("save the model's state_dict, not the model itself"));
    };
    let views = machine.named_tensors(entries);
    if views.is_empty() {
        return Err(WorkerError::checkpoint("its pickle holds no tensors").hint("choose another file or revision"));
    }
    Ok(views)
}

/// Names that a pickle may use.
#[derive(Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(&'static StoredDtype),
}

impl Global {
    fn find(module: &str, name: &str) -> Result<Self> {
        match (module, name) {
            ("collections", "OrderedDict") => return Ok(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => return Ok(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => return Ok(Self::RebuildParameter),
            ("torch", name) => {
                if let Some((_, dtype)) = STORAGES.iter().find(|(known, _)| *known == name) {
                    return Ok(Self::Storage(dtype));
                }
            }
            _ => {}
        }
        let message =
            format!("its pickle wants to use {}, which is no part of a tensor", shown(&format!("{module}.{name}")));
        Err(WorkerError::checkpoint(message)
            .hint("nothing was executed, but do not use this file elsewhere unless you know where it comes from"))
    }
}

#[derive(Clone, Copy)]
enum Value<'p> {
    /// Something that no tensor depends on.
    Opaque,
    Int(i64),
    Text(&'p str),
    Global(Global),
    /// Index into [`Machine::tuples`].
    Tuple(usize),
    /// Index into [`Machine::dicts`].
    Dict(usize),
    Storage(Storage<'p>),
    /// Index into [`Machine::tensors`].
    Tensor(usize),
}

#[derive(Default)]
struct Machine<'p> {
    stack: Vec<Value<'p>>,
    /// Heights of the stack, for instructions that take "everything since".
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'p>>,
    tuples: Vec<Vec<Value<'p>>>,
    dicts: Vec<Vec<(Value<'p>, Value<'p>)>>,
    /// Not yet named.
    tensors: Vec<View<'p>>,
}

impl<'p> Machine<'p> {
    /// Runs to the end, which leaves one value.
    fn run(&mut self, mut program: Bytes<'p>) -> Result<Value<'p>> {
        loop {
            match self.step(&mut program)? {
                None => {}
                Some(result) => return Ok(result),
            }
        }
    }

    /// One instruction; the result after the last.
    fn step(&mut self, program: &mut Bytes<'p>) -> Result<Option<Value<'p>>> {
        match need(program.u8())? {
            b'.' => return self.pop().map(Some),
            // Protocol number.
            0x80 => need(program.u8()).map(|_| ())?,
            b'(' => self.marks.push(self.stack.len()),
            b'N' | 0x88 | 0x89 | b']' => self.stack.push(Value::Opaque),
            b'G' => need(program.take(8)).map(|_| self.stack.push(Value::Opaque))?,
            b'K' => self.push_int(program.u8())?,
            b'M' => self.push_int(program.u16())?,
            b'J' => self.push_int(program.i32())?,
            0x8a => self.push_int(long(program))?,
            b'X' => self.push_text(program)?,
            b'c' => self.push_global(program)?,
            b')' => self.push_tuple(Vec::new()),
            0x85 => self.pop_many(1).map(|items| self.push_tuple(items))?,
            0x86 => self.pop_many(2).map(|items| self.push_tuple(items))?,
            0x87 => self.pop_many(3).map(|items| self.push_tuple(items))?,
            b't' => self.pop_to_mark().map(|items| self.push_tuple(items))?,
            b'}' => self.push_dict(),
            b's' => self.pop_many(2).and_then(|pair| self.set_items(&pair))?,
            b'u' => self.pop_to_mark().and_then(|pairs| self.set_items(&pairs))?,
            b'a' => self.pop().map(|_| ())?,
            b'e' => self.pop_to_mark().map(|_| ())?,
            b'q' => self.remember(program.u8().map(u32::from))?,
            b'r' => self.remember(program.u32())?,
            b'h' => self.recall(program.u8().map(u32::from))?,
            b'j' => self.recall(program.u32())?,
            b'Q' => self.load_storage()?,
            b'R' => self.call()?,
            // Attributes of the object below, which stays: nothing in them is a tensor of the dictionary.
            b'b' => self.pop().map(|_| ())?,
            other => {
                return Err(damaged(format!(
                    "its pickle uses the instruction {other:#04x}, which tensors do not need"
                )));
            }
        }
        Ok(None)
    }

    fn push_int(&mut self, value: Option<impl Into<i64>>) -> Result<()> {
        self.stack.push(Value::Int(need(value)?.into()));
        Ok(())
    }

    fn push_text(&mut self, program: &mut Bytes<'p>) -> Result<()> {
        let len = need(program.u32())?;
        let text = need(usize::try_from(len).ok().and_then(|len| program.take(len)))?;
        let text = std::str::from_utf8(text).map_err(|_| damaged("its pickle holds text that is not UTF-8"))?;
        self.stack.push(Value::Text(text));
        Ok(())
    }

    fn push_global(&mut self, program: &mut Bytes<'p>) -> Result<()> {
        let (module, name) = (need(program.line())?, need(program.line())?);
        let global = Global::find(&String::from_utf8_lossy(module), &String::from_utf8_lossy(name))?;
        self.stack.push(Value::Global(global));
        Ok(())
    }

    fn push_tuple(&mut self, items: Vec<Value<'p>>) {
        self.stack.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(items);
    }

    fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    /// Takes the topmost value; what lies below a mark is out of reach until the mark is gone.
    fn pop(&mut self) -> Result<Value<'p>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        need(if self.stack.len() > floor { self.stack.pop() } else { None })
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Value<'p>>> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        items.reverse();
        Ok(items)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value<'p>>> {
        let height = need(self.marks.pop())?;
        Ok(self.stack.split_off(height))
    }

    fn set_items(&mut self, items: &[Value<'p>]) -> Result<()> {
        let (pairs, []) = items.as_chunks::<2>() else { return Err(malformed()) };
        let Some(Value::Dict(dict)) = self.stack.last() else { return Err(malformed()) };
        self.dicts[*dict].extend(pairs.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn remember(&mut self, slot: Option<u32>) -> Result<()> {
        let value = need(self.stack.last().copied())?;
        self.memo.insert(need(slot)?, value);
        Ok(())
    }

    fn recall(&mut self, slot: Option<u32>) -> Result<()> {
        let value = need(self.memo.get(&need(slot)?).copied())?;
        self.stack.push(value);
        Ok(())
    }

    fn pop_tuple(&mut self) -> Result<&[Value<'p>]> {
        match self.pop()? {
            Value::Tuple(number) => Ok(&self.tuples[number]),
            _ => Err(malformed()),
        }
    }

    /// `("storage", type, key, device, values)`: the only kind of object that lies outside the pickle.
    fn load_storage(&mut self) -> Result<()> {
        let &[Value::Text("storage"), Value::Global(Global::Storage(dtype)), Value::Text(key), _, Value::Int(values)] =
            self.pop_tuple()?
        else {
            return Err(malformed());
        };
        if key.len() > MAX_KEY {
            return Err(damaged(format!("its pickle names a storage {}", shown(key))));
        }
        let values = u64::try_from(values).map_err(|_| malformed())?;
        self.stack.push(Value::Storage(Storage { dtype, key, values }));
        Ok(())
    }

    /// What the call of a known name would give.
    fn call(&mut self) -> Result<()> {
        let arguments = self.pop_tuple()?.to_vec();
        match (self.pop()?, &arguments[..]) {
            (Value::Global(Global::OrderedDict), []) => self.push_dict(),
            (
                Value::Global(Global::RebuildTensor),
                [Value::Storage(storage), Value::Int(offset), Value::Tuple(shape), Value::Tuple(strides), ..],
            ) => self.push_tensor(*storage, *offset, *shape, *strides)?,
            // Data, whether it is trained, hooks.
            (Value::Global(Global::RebuildParameter), [data @ Value::Tensor(_), ..]) => self.stack.push(*data),
            _ => return Err(malformed()),
        }
        Ok(())
    }

    fn push_tensor(&mut self, storage: Storage<'p>, offset: i64, shape: usize, strides: usize) -> Result<()> {
        let (shape, strides) = (self.numbers(shape)?, self.numbers(strides)?);
        if shape.len() != strides.len() || shape.len() > MAX_RANK {
            return Err(damaged(format!("its pickle has a tensor of {} dimensions", shape.len())));
        }
        let offset = u64::try_from(offset).map_err(|_| malformed())?;
        self.stack.push(Value::Tensor(self.tensors.len()));
        self.tensors.push(View { name: "", storage, offset, shape, strides });
        Ok(())
    }

    /// The entries of a dictionary that are tensors.
    fn named_tensors(&self, dict: usize) -> Vec<View<'p>> {
        let named = |(key, value): &(Value<'p>, Value<'p>)| match (*key, *value) {
            (Value::Text(name), Value::Tensor(number)) => Some(View { name, ..self.tensors[number].clone() }),
            _ => None,
        };
        self.dicts[dict].iter().filter_map(named).collect()
    }

    /// A tuple of non-negative numbers.
    fn numbers(&self, tuple: usize) -> Result<Vec<u64>> {
        let number = |item: &Value<'_>| match item {
            Value::Int(value) => u64::try_from(*value).map_err(|_| malformed()),
            _ => Err(malformed()),
        };
        // One more than can be right is enough to see that there are too many.
        self.tuples[tuple].iter().take(MAX_RANK + 1).map(number).collect()
    }
}

/// A number of up to eight bytes; real ones count values.
fn long(program: &mut Bytes<'_>) -> Option<i64> {
    let len = usize::from(program.u8()?);
    let bytes = program.take(len).filter(|bytes| bytes.len() <= 8)?;
    let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..len].copy_from_slice(bytes);
    Some(i64::from_le_bytes(wide))
}

fn need<T>(value: Option<T>) -> Result<T> {
    value.ok_or_else(malformed)
}

fn malformed() -> WorkerError {
    damaged("its pickle is not one of a dictionary of tensors")
}
