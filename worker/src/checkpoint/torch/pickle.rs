//! A pickle machine for tensors only.
//!
//! Pickles are programs for a stack machine whose dangerous instructions name Python functions and
//! call them. This machine accepts only the names that a dictionary of tensors needs, refuses all
//! others by name, and calls nothing. Compound values are stored in tables and referred to by
//! index, so that memoising and nesting, which a malicious pickle can repeat a million times, cost
//! one number each.

use std::collections::HashMap;

use super::bytes::Bytes;
use super::damaged;
use crate::checkpoint::safetensors::{StoredDtype, shown};
use crate::error::{Result, WorkerError};

/// Maximum dimensions of a tensor.
const MAX_RANK: usize = 16;
/// Maximum characters of a storage's name. Real ones are numbers.
const MAX_KEY: usize = 64;
/// Maximum arguments of a function.
const MAX_ARGUMENTS: usize = 8;
/// Newest supported protocol.
const LAST_PROTOCOL: u8 = 5;

/// An element type: its safetensors name, and bytes per value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Element {
    pub(super) name: &'static str,
    pub(super) size: u64,
}

impl Element {
    /// The type as a [`StoredDtype`].
    pub(super) fn dtype(self) -> StoredDtype {
        StoredDtype::from_name(self.name)
    }
}

/// PyTorch's names of typed storages and of their types. Newer types have no typed storage.
#[rustfmt::skip]
static ELEMENTS: [(&str, &str, Element); 25] = [
    ("DoubleStorage", "float64", Element { name: "F64", size: 8 }),
    ("FloatStorage", "float32", Element { name: "F32", size: 4 }),
    ("HalfStorage", "float16", Element { name: "F16", size: 2 }),
    ("BFloat16Storage", "bfloat16", Element { name: "BF16", size: 2 }),
    ("LongStorage", "int64", Element { name: "I64", size: 8 }),
    ("IntStorage", "int32", Element { name: "I32", size: 4 }),
    ("ShortStorage", "int16", Element { name: "I16", size: 2 }),
    ("CharStorage", "int8", Element { name: "I8", size: 1 }),
    ("ByteStorage", "uint8", Element { name: "U8", size: 1 }),
    ("BoolStorage", "bool", Element { name: "BOOL", size: 1 }),
    ("ComplexFloatStorage", "complex64", Element { name: "C64", size: 8 }),
    ("ComplexDoubleStorage", "complex128", Element { name: "C128", size: 16 }),
    ("QInt8Storage", "qint8", Element { name: "QI8", size: 1 }),
    ("QUInt8Storage", "quint8", Element { name: "QU8", size: 1 }),
    ("QInt32Storage", "qint32", Element { name: "QI32", size: 4 }),
    ("", "complex32", Element { name: "C32", size: 4 }),
    ("", "float8_e4m3fn", Element { name: "F8_E4M3", size: 1 }),
    ("", "float8_e5m2", Element { name: "F8_E5M2", size: 1 }),
    ("", "float8_e8m0fnu", Element { name: "F8_E8M0", size: 1 }),
    ("", "float8_e4m3fnuz", Element { name: "F8_E4M3FNUZ", size: 1 }),
    ("", "float8_e5m2fnuz", Element { name: "F8_E5M2FNUZ", size: 1 }),
    ("", "float4_e2m1fn_x2", Element { name: "F4_X2", size: 1 }),
    ("", "uint16", Element { name: "U16", size: 2 }),
    ("", "uint32", Element { name: "U32", size: 4 }),
    ("", "uint64", Element { name: "U64", size: 8 }),
];

/// Names from PyTorch's list of safe globals whose results no readable tensor needs.
static HARMLESS: [(&str, &str); 20] = [
    ("_codecs", "encode"),
    ("builtins", "bytearray"),
    ("builtins", "complex"),
    ("builtins", "set"),
    ("__builtin__", "bytearray"),
    ("__builtin__", "complex"),
    ("__builtin__", "set"),
    ("collections", "Counter"),
    ("torch", "Tensor"),
    ("torch", "device"),
    ("torch", "per_channel_affine"),
    ("torch", "per_channel_affine_float_qparams"),
    ("torch", "per_tensor_affine"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_wrapper_subclass"),
    ("torch.nn.parameter", "Parameter"),
    ("torch.serialization", "_get_layout"),
];

/// A storage: the values of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Storage<'p> {
    pub(super) element: Element,
    /// Name of its record.
    pub(super) key: &'p str,
    /// Number of values.
    pub(super) values: u64,
}

/// A tensor: a view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View<'p> {
    pub(super) name: &'p str,
    pub(super) storage: Storage<'p>,
    /// Index of its first value in the storage.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    /// Number of values between indices, per dimension, in the order of `shape`.
    pub(super) strides: Vec<u64>,
    /// Whether its values are the stored ones negated or conjugated.
    pub(super) altered: bool,
}

impl View<'_> {
    fn dims(&self) -> impl DoubleEndedIterator<Item = (u64, u64)> + '_ {
        self.shape.iter().copied().zip(self.strides.iter().copied())
    }

    /// Number of values from its first to its last, both included; `None` on overflow.
    pub(super) fn span(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        self.dims().try_fold(1_u64, |span, (dim, stride)| span.checked_add((dim - 1).checked_mul(stride)?))
    }

    /// Whether its values are contiguous in row-major order.
    pub(super) fn is_contiguous(&self) -> bool {
        let step = |expected: u64, (dim, stride): (u64, u64)| match dim {
            1 => Some(expected),
            dim if stride == expected => expected.checked_mul(dim),
            _ => None,
        };
        self.shape.contains(&0) || self.dims().rev().try_fold(1, step).is_some()
    }
}

/// The tensors of a pickled `state_dict`, in its order. Other entries are left out.
pub(super) fn state_dict(program: &[u8]) -> Result<Vec<View<'_>>> {
    let mut machine = StackMachine::default();
    let top = machine.run(Bytes(program))?;
    let Value::Dict(entries) = top else {
        return Err(WorkerError::checkpoint("its pickle is not a dictionary of tensors")
            .hint("save the model's state_dict, not the model itself"));
    };
    if let Some(entry) = machine.wrapped(entries) {
        let entry = shown(entry);
        let message = format!("its tensors are inside its entry {entry}, where transformers does not look for them");
        return Err(
            WorkerError::checkpoint(message).hint(format!("save that entry alone: torch.save(loaded[{entry}], ...)"))
        );
    }
    let views = machine.named_tensors(entries);
    if views.is_empty() {
        return Err(WorkerError::checkpoint("its pickle holds no tensors").hint("choose another file or revision"));
    }
    Ok(views)
}

/// Accepted names.
#[derive(Clone, Copy)]
enum Global {
    OrderedDict,
    /// A tuple with another name.
    Size,
    /// Arguments: storage, offset, shape, strides, and more.
    RebuildTensor,
    /// As `RebuildTensor` for an untyped storage, with the type as an additional argument.
    RebuildTyped,
    RebuildParameter,
    /// Arguments: one of these functions, a class, its arguments, attributes.
    RebuildFromType,
    Storage(Element),
    UntypedStorage,
    Type(Element),
    Harmless,
}

impl Global {
    fn find(module: &str, name: &str) -> Result<Self> {
        let known = match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch", "Size") => Some(Self::Size),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_qtensor") => {
                Some(Self::RebuildTensor)
            }
            ("torch._utils", "_rebuild_tensor_v3") => Some(Self::RebuildTyped),
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Some(Self::RebuildParameter),
            ("torch._tensor", "_rebuild_from_type_v2") => Some(Self::RebuildFromType),
            ("torch.storage", "UntypedStorage") => Some(Self::UntypedStorage),
            pair if HARMLESS.contains(&pair) => Some(Self::Harmless),
            ("torch", name) => Self::element(name),
            _ => None,
        };
        known.ok_or_else(|| {
            let named = shown(&format!("{module}.{name}"));
            WorkerError::checkpoint(format!("its pickle wants to use {named}, which is no part of a tensor"))
                .hint("nothing was executed, but do not use this file elsewhere unless you know where it comes from")
        })
    }

    /// The element type of a storage's or type's name.
    fn element(name: &str) -> Option<Self> {
        ELEMENTS.iter().find_map(|(storage, dtype, element)| match name {
            "" => None,
            name if name == *storage => Some(Self::Storage(*element)),
            name if name == *dtype => Some(Self::Type(*element)),
            _ => None,
        })
    }
}

#[derive(Clone, Copy)]
enum Value<'p> {
    /// A value that no tensor depends on.
    Opaque,
    Int(i64),
    Text(&'p str),
    Global(Global),
    /// Index into [`StackMachine::tuples`].
    Tuple(usize),
    /// Index into [`StackMachine::dicts`].
    Dict(usize),
    Storage(Storage<'p>),
    /// The bytes of a record, whose type is in the tensor.
    Untyped {
        key: &'p str,
        bytes: u64,
    },
    /// Index into [`StackMachine::tensors`].
    Tensor(usize),
}

#[derive(Default)]
struct StackMachine<'p> {
    stack: Vec<Value<'p>>,
    /// Stack heights of marks, for instructions that take all values since the last mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'p>>,
    tuples: Vec<Vec<Value<'p>>>,
    dicts: Vec<Vec<(Value<'p>, Value<'p>)>>,
    /// Tensors without names yet.
    tensors: Vec<View<'p>>,
}

impl<'p> StackMachine<'p> {
    /// Runs the program, which must leave one value.
    fn run(&mut self, mut program: Bytes<'p>) -> Result<Value<'p>> {
        loop {
            match self.step(&mut program)? {
                None => {}
                Some(result) => return Ok(result),
            }
        }
    }

    /// Executes one instruction. Returns the result after the last.
    fn step(&mut self, program: &mut Bytes<'p>) -> Result<Option<Value<'p>>> {
        match need(program.u8())? {
            b'.' => return self.pop().map(Some),
            0x80 => check_protocol(need(program.u8())?)?,
            // Length of the next frame.
            0x95 => need(program.u64()).map(|_| ())?,
            b'(' => self.marks.push(self.stack.len()),
            b'c' => self.push_global(program)?,
            0x93 => self.push_stacked_global()?,
            b')' => self.push_tuple(Vec::new()),
            0x85 => self.pop_many(1).map(|items| self.push_tuple(items))?,
            0x86 => self.pop_many(2).map(|items| self.push_tuple(items))?,
            0x87 => self.pop_many(3).map(|items| self.push_tuple(items))?,
            b't' => self.pop_to_mark().map(|items| self.push_tuple(items))?,
            // Frozen set.
            0x91 => self.pop_to_mark().map(|_| self.stack.push(Value::Opaque))?,
            b'}' => self.push_dict(),
            b's' => self.pop_many(2).and_then(|pair| self.set_items(&pair))?,
            b'u' => self.pop_to_mark().and_then(|pairs| self.set_items(&pairs))?,
            // Appends to lists and sets.
            b'a' => self.pop().map(|_| ())?,
            b'e' | 0x90 => self.pop_to_mark().map(|_| ())?,
            b'q' => self.remember(program.u8().map(u32::from))?,
            b'r' => self.remember(program.u32())?,
            0x94 => self.remember(u32::try_from(self.memo.len()).ok())?,
            b'h' => self.recall(program.u8().map(u32::from))?,
            b'j' => self.recall(program.u32())?,
            b'Q' => self.load_storage()?,
            b'R' => self.call()?,
            // Attributes of the object below, which stays: they contain no tensor of the
            // dictionary.
            b'b' => self.pop().map(|_| ())?,
            other => self.push_literal(other, program)?,
        }
        Ok(None)
    }

    /// Executes an instruction with an inline value.
    fn push_literal(&mut self, instruction: u8, program: &mut Bytes<'p>) -> Result<()> {
        let (one, four) = (|p: &mut Bytes<'p>| p.u8().map(u64::from), |p: &mut Bytes<'p>| p.u32().map(u64::from));
        let value = match instruction {
            // None, true, false, an empty list, an empty set.
            b'N' | 0x88 | 0x89 | b']' | 0x8f => Value::Opaque,
            // Float, bytes.
            b'G' => need(program.take(8)).map(|_| Value::Opaque)?,
            b'C' => need(program.after(one)).map(|_| Value::Opaque)?,
            b'B' => need(program.after(four)).map(|_| Value::Opaque)?,
            0x8e | 0x96 => need(program.after(Bytes::u64)).map(|_| Value::Opaque)?,
            b'K' => Value::Int(need(program.u8())?.into()),
            b'M' => Value::Int(need(program.u16())?.into()),
            b'J' => Value::Int(need(program.i32())?.into()),
            0x8a => integer(need(program.after(one))?),
            0x8b => integer(need(program.after(four))?),
            0x8c => text(need(program.after(one))?)?,
            b'X' => text(need(program.after(four))?)?,
            0x8d => text(need(program.after(Bytes::u64))?)?,
            other => {
                let what = format!("its pickle uses the instruction {other:#04x}, which tensors do not need");
                return Err(damaged(what));
            }
        };
        self.stack.push(value);
        Ok(())
    }

    fn push_global(&mut self, program: &mut Bytes<'p>) -> Result<()> {
        let (module, name) = (need(program.line())?, need(program.line())?);
        let global = Global::find(&String::from_utf8_lossy(module), &String::from_utf8_lossy(name))?;
        self.stack.push(Value::Global(global));
        Ok(())
    }

    /// Pushes a name whose parts are on the stack.
    fn push_stacked_global(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        let (Value::Text(module), Value::Text(name)) = (module, name) else { return Err(malformed()) };
        self.stack.push(Value::Global(Global::find(module, name)?));
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

    /// Pops the topmost value. Values below a mark are inaccessible until the mark is removed.
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

    /// Loads `("storage", type, key, device, values)`, the only kind of object outside the pickle.
    fn load_storage(&mut self) -> Result<()> {
        let &[Value::Text("storage"), Value::Global(kind), Value::Text(key), _, Value::Int(values)] =
            self.pop_tuple()?
        else {
            return Err(malformed());
        };
        if key.len() > MAX_KEY {
            return Err(damaged(format!("its pickle names a storage {}", shown(key))));
        }
        let values = u64::try_from(values).map_err(|_| malformed())?;
        self.stack.push(match kind {
            Global::Storage(element) => Value::Storage(Storage { element, key, values }),
            Global::UntypedStorage => Value::Untyped { key, bytes: values },
            _ => return Err(malformed()),
        });
        Ok(())
    }

    /// Pushes the result of a call of an accepted name.
    fn call(&mut self) -> Result<()> {
        let arguments = self.pop()?;
        let (Value::Tuple(arguments), Value::Global(function)) = (arguments, self.pop()?) else {
            return Err(malformed());
        };
        let value = match (function, self.arguments(arguments).as_slice()) {
            (Global::RebuildFromType, [Value::Global(function), _, Value::Tuple(inner), ..]) => {
                let inner = self.arguments(*inner);
                self.result(*function, &inner)?
            }
            (function, arguments) => self.result(function, arguments)?,
        };
        self.stack.push(value);
        Ok(())
    }

    /// The first arguments only: no accepted function needs more, and a malicious pickle may pass
    /// a million, many times.
    fn arguments(&self, tuple: usize) -> Vec<Value<'p>> {
        self.tuples[tuple].iter().take(MAX_ARGUMENTS).copied().collect()
    }

    fn result(&mut self, function: Global, arguments: &[Value<'p>]) -> Result<Value<'p>> {
        match (function, arguments) {
            (Global::OrderedDict, []) => {
                self.dicts.push(Vec::new());
                Ok(Value::Dict(self.dicts.len() - 1))
            }
            (Global::Size, [tuple @ Value::Tuple(_)]) => Ok(*tuple),
            // The rest: requires_grad, hooks, and changes of the values.
            (Global::RebuildTensor, [Value::Storage(storage), place @ ..]) => {
                self.tensor(*storage, place, place.get(5))
            }
            (Global::RebuildTyped, [Value::Untyped { key, bytes }, place @ ..]) => {
                let Some(Value::Global(Global::Type(element))) = place.get(5) else { return Err(malformed()) };
                let values = bytes / element.size;
                let storage = Storage { element: *element, key, values };
                self.tensor(storage, place, place.get(6))
            }
            // Data, requires_grad, hooks.
            (Global::RebuildParameter, [data @ (Value::Tensor(_) | Value::Opaque), ..]) => Ok(*data),
            (Global::Harmless, _) => Ok(Value::Opaque),
            _ => Err(malformed()),
        }
    }

    /// A tensor from `[offset, shape, strides, ..]`. `changes` has entries if its values differ
    /// from the stored ones.
    fn tensor(&mut self, storage: Storage<'p>, place: &[Value<'p>], changes: Option<&Value<'p>>) -> Result<Value<'p>> {
        let [Value::Int(offset), Value::Tuple(shape), Value::Tuple(strides), ..] = place else {
            return Err(malformed());
        };
        let (shape, strides) = (self.numbers(*shape)?, self.numbers(*strides)?);
        if shape.len() != strides.len() || shape.len() > MAX_RANK {
            return Err(damaged(format!("its pickle has a tensor of {} dimensions", shape.len())));
        }
        let offset = u64::try_from(*offset).map_err(|_| malformed())?;
        let altered = matches!(changes, Some(Value::Dict(changes)) if !self.dicts[*changes].is_empty());
        self.tensors.push(View { name: "", storage, offset, shape, strides, altered });
        Ok(Value::Tensor(self.tensors.len() - 1))
    }

    /// The entry with more tensors than the dictionary itself: a `state_dict` beside other
    /// objects.
    fn wrapped(&self, dict: usize) -> Option<&'p str> {
        let count = |entries: &Vec<_>| entries.iter().filter(|entry| self.named_tensor(entry).is_some()).count();
        // Each dictionary is counted once: it may be a million entries.
        let counts: Vec<usize> = self.dicts.iter().map(count).collect();
        self.dicts[dict].iter().find_map(|(key, value)| match (*key, *value) {
            (Value::Text(name), Value::Dict(inner)) if counts[inner] > counts[dict] => Some(name),
            _ => None,
        })
    }

    /// The entries of a dictionary that are tensors.
    fn named_tensors(&self, dict: usize) -> Vec<View<'p>> {
        let named = self.dicts[dict].iter().filter_map(|entry| self.named_tensor(entry));
        named.map(|(name, view)| View { name, ..view.clone() }).collect()
    }

    fn named_tensor(&self, (key, value): &(Value<'p>, Value<'p>)) -> Option<(&'p str, &View<'p>)> {
        match (*key, *value) {
            (Value::Text(name), Value::Tensor(number)) => Some((name, &self.tensors[number])),
            _ => None,
        }
    }

    /// A tuple of non-negative numbers.
    fn numbers(&self, tuple: usize) -> Result<Vec<u64>> {
        let number = |item: &Value<'_>| match item {
            Value::Int(value) => u64::try_from(*value).map_err(|_| malformed()),
            _ => Err(malformed()),
        };
        // One more than the limit suffices to detect too many.
        self.tuples[tuple].iter().take(MAX_RANK + 1).map(number).collect()
    }
}

/// Refuses protocols newer than the supported ones.
fn check_protocol(number: u8) -> Result<()> {
    if number <= LAST_PROTOCOL {
        return Ok(());
    }
    let message = format!("it is of pickle protocol {number}; those up to {LAST_PROTOCOL} are read");
    Err(WorkerError::unsupported(message)
        .hint("save it again with torch.save and its own pickle protocol, or as safetensors"))
}

/// A little-endian number. Only those of up to eight bytes can count values.
fn integer<'p>(bytes: &[u8]) -> Value<'p> {
    let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    let Some(low) = wide.get_mut(..bytes.len()) else { return Value::Opaque };
    low.copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(wide))
}

fn text(bytes: &[u8]) -> Result<Value<'_>> {
    let text = std::str::from_utf8(bytes).map_err(|_| damaged("its pickle holds text that is not UTF-8"))?;
    Ok(Value::Text(text))
}

fn need<T>(value: Option<T>) -> Result<T> {
    value.ok_or_else(malformed)
}

fn malformed() -> WorkerError {
    damaged("its pickle is not one of a dictionary of tensors")
}
