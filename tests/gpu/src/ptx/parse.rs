//! Parser of PTX. An unsupported instruction is kept with its text and fails when it is executed.

use std::collections::HashMap;
use std::ops::Range;

use half::{bf16, f16};

use super::{
    Address, Atomic, Comparison, Instruction, Kernel, One, Operation, Order, Rounding, Source, Space, Special, Two,
    Type,
};

/// Ranges of the kernels' text.
pub(super) fn kernels(text: &str) -> HashMap<String, Range<usize>> {
    const ENTRY: &str = ".entry ";
    let mut found = HashMap::new();
    for (at, _) in text.match_indices(ENTRY) {
        let rest = &text[at + ENTRY.len()..];
        let name = rest.split(|c: char| !is_name(c)).next().unwrap_or_default();
        found.insert(name.to_owned(), at..at + ENTRY.len() + body_end(rest));
    }
    found
}

/// Names of the shared memory that has no size of its own. All begin at one place.
pub(super) fn added_by_launch(text: &str) -> Vec<String> {
    text.lines().filter_map(|line| line.trim().strip_prefix(".extern .shared ")).map(declared_name).collect()
}

/// Where the brace closes that is opened first.
fn body_end(text: &str) -> usize {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 1 => return at,
            '}' => depth -= 1,
            _ => {}
        }
    }
    text.len()
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '$')
}

/// Replaces comments by spaces.
fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// A kernel from its name on to its last line; `added` as [`added_by_launch`] gives it.
pub(super) fn kernel(name: &str, text: &str, added: &[String]) -> Kernel {
    let text = without_comments(text);
    let (head, body) = text.split_once('{').unwrap_or((&text, ""));
    let mut scope = Scope::default();
    let mut parameters = Vec::new();
    for parameter in head.split(".param").skip(1) {
        let end = parameters.last().map_or(0, |(bytes, at): &(usize, usize)| bytes + at);
        let bytes = size_of_declared(parameter);
        let align = alignment(parameter).unwrap_or(bytes).max(1);
        let at = end.next_multiple_of(align);
        scope.symbols.insert(declared_name(parameter), at as u64);
        parameters.push((bytes, at));
    }
    let mut statements = Vec::new();
    for statement in split(body) {
        match statement {
            Statement::Label(label) => {
                scope.labels.insert(label, statements.len());
            }
            Statement::Directive(directive) => scope.declare(&directive),
            Statement::Instruction(text) => statements.push(text),
        }
    }
    let end = scope.shared.next_multiple_of(16) as u64;
    scope.symbols.extend(added.iter().map(|name| (name.clone(), end)));
    let code = statements.iter().map(|text| scope.instruction(text)).collect();
    Kernel {
        name: name.to_owned(),
        parameters,
        registers: scope.registers.len(),
        shared: scope.shared,
        local: scope.local,
        code,
    }
}

enum Statement {
    Label(String),
    Directive(String),
    Instruction(String),
}

/// Statements of a body. Braces of scopes are ignored: inline assembly declares its registers and
/// writes them before it reads them.
fn split(body: &str) -> Vec<Statement> {
    let mut statements = Vec::new();
    let mut current = String::new();
    let mut in_operand = false;
    for c in body.chars() {
        match c {
            '{' | '}' if current.trim().is_empty() => current.clear(),
            '{' => {
                in_operand = true;
                current.push(c);
            }
            '}' if in_operand => {
                in_operand = false;
                current.push(c);
            }
            ';' => {
                let text = current.split_whitespace().collect::<Vec<_>>().join(" ");
                current.clear();
                match text.strip_prefix('.') {
                    Some(directive) => statements.push(Statement::Directive(directive.to_owned())),
                    None if text.is_empty() => {}
                    None => statements.push(Statement::Instruction(text)),
                }
            }
            ':' => statements.push(Statement::Label(std::mem::take(&mut current).trim().to_owned())),
            c => current.push(c),
        }
    }
    statements
}

/// Symbols of a kernel.
#[derive(Default)]
struct Scope {
    registers: HashMap<String, u32>,
    /// Offsets within parameters, shared and local memory.
    symbols: HashMap<String, u64>,
    labels: HashMap<String, usize>,
    shared: usize,
    local: usize,
}

/// `.param .u64 .ptr name`, `.shared .align 4 .b8 name[4096]`: the last word, without brackets.
fn declared_name(text: &str) -> String {
    let text = text.split(['[', ',', ')', '=']).next().unwrap_or_default();
    text.split_whitespace().last().unwrap_or_default().to_owned()
}

fn alignment(text: &str) -> Option<usize> {
    text.split(".align ").nth(1)?.split_whitespace().next()?.parse().ok()
}

/// Bytes of one element times their number.
fn size_of_declared(text: &str) -> usize {
    let word = text.split(|c: char| !is_name(c) && c != '.').filter_map(|word| word.strip_prefix('.'));
    let bytes = word.filter_map(type_of).map(|kind| kind.bits() as usize / 8).next().unwrap_or(0);
    let many = text.split_once('[').and_then(|(_, rest)| rest.split(']').next());
    match many {
        None => bytes,
        Some(many) => bytes * many.trim().parse().unwrap_or(0),
    }
}

fn type_of(word: &str) -> Option<Type> {
    Some(match word {
        "pred" => Type::Pred,
        "u8" | "b8" => Type::U(8),
        "u16" | "b16" => Type::U(16),
        "u32" | "b32" => Type::U(32),
        "u64" | "b64" => Type::U(64),
        "s8" => Type::S(8),
        "s16" => Type::S(16),
        "s32" => Type::S(32),
        "s64" => Type::S(64),
        "f16" => Type::F16,
        "bf16" => Type::Bf16,
        "f32" => Type::F32,
        "f64" => Type::F64,
        _ => return None,
    })
}

impl Scope {
    fn declare(&mut self, directive: &str) {
        let (align, bytes) = (alignment(directive).unwrap_or(8), size_of_declared(&format!(".{directive}")));
        let place = |end: &mut usize| {
            let at = end.next_multiple_of(align);
            *end = at + bytes;
            at as u64
        };
        let at = match directive.split_whitespace().next() {
            Some("shared") => place(&mut self.shared),
            Some("local") => place(&mut self.local),
            // Registers are numbered in order of first use.
            _ => return,
        };
        self.symbols.insert(declared_name(directive), at);
    }

    fn register(&mut self, name: &str) -> u32 {
        let next = self.registers.len() as u32;
        *self.registers.entry(name.to_owned()).or_insert(next)
    }

    fn instruction(&mut self, text: &str) -> Instruction {
        let (only_if, rest) = match text.strip_prefix('@') {
            None => (None, text),
            Some(guarded) => {
                let (predicate, rest) = guarded.split_once(' ').unwrap_or((guarded, ""));
                let (name, wanted) = match predicate.strip_prefix('!') {
                    Some(name) => (name, false),
                    None => (predicate, true),
                };
                (Some((self.register(name), wanted)), rest)
            }
        };
        let operation = self.operation(rest).unwrap_or_else(|| Operation::Unknown { text: rest.to_owned() });
        Instruction { only_if, operation }
    }

    fn operation(&mut self, text: &str) -> Option<Operation> {
        let (name, operands) = text.split_once(' ').unwrap_or((text, ""));
        let words: Vec<&str> = name.split('.').collect();
        let kinds: Vec<Type> = words.iter().filter_map(|word| type_of(word)).collect();
        let operands = operand_list(operands);
        let rounding = rounding(&words);
        if let Some(what) = comparison(words.get(1).copied().unwrap_or_default())
            && matches!(words[0], "setp" | "set")
        {
            // Predicates with a second register or a combination are unsupported.
            let [to, a, b] = operands.as_slice() else { return None };
            let kind = *kinds.last()?;
            let of = [self.source(a, kind)?, self.source(b, kind)?];
            let to = self.register(to);
            return Some(match words[0] {
                "setp" => Operation::Compare { what, kind, to, of },
                _ => Operation::Set { what, kind, result: kinds[0], to, of },
            });
        }
        match words[0] {
            "mov" => self.moved(&operands, *kinds.first()?),
            "cvta" => {
                let [to, of] = operands.as_slice() else { return None };
                let of = self.source(of, Type::U(64))?;
                Some(Operation::Move { to: self.register(to), of })
            }
            "ld" => self.load(&words, *kinds.last()?, &operands),
            "st" => self.store(&words, *kinds.last()?, &operands),
            "atom" => self.atomic(&words, *kinds.last()?, &operands),
            "cvt" => {
                if let (Some(into), [to, high, low]) = (pair_type(&words), operands.as_slice()) {
                    let of = [self.source(low, Type::F32)?, self.source(high, Type::F32)?];
                    return (kinds == [Type::F32]).then(|| Operation::ConvertPair { into, to: self.register(to), of });
                }
                let ([into, from], [to, of]) = (kinds.as_slice(), operands.as_slice()) else { return None };
                let to_integer = words.iter().any(|word| matches!(*word, "rni" | "rzi" | "rmi" | "rpi"));
                let saturated = words.contains(&"sat");
                let (from, into, of) = (*from, *into, self.source(of, *from)?);
                Some(Operation::Convert { from, into, rounding, to_integer, saturated, to: self.register(to), of })
            }
            "selp" => {
                let [to, a, b, by] = operands.as_slice() else { return None };
                let kind = *kinds.first()?;
                let of = [self.source(a, kind)?, self.source(b, kind)?];
                let by = self.source(by, Type::Pred)?;
                Some(Operation::Select { to: self.register(to), of, by })
            }
            "fma" | "mad" => {
                let [to, a, b, c] = operands.as_slice() else { return None };
                if let Some(kind) = pair_type(&words) {
                    let pair = Type::U(32);
                    let of = [self.source(a, pair)?, self.source(b, pair)?, self.source(c, pair)?];
                    return Some(Operation::FusedPair { kind, to: self.register(to), of });
                }
                let (kind, wide) = (*kinds.first()?, words.contains(&"wide"));
                let known = kind.is_float() || wide || words.contains(&"lo");
                let with_carry = words.contains(&"cc");
                if !known || with_carry {
                    return None;
                }
                let sum = match (wide, kind) {
                    (true, Type::U(bits)) => Type::U(2 * bits),
                    (true, Type::S(bits)) => Type::S(2 * bits),
                    _ => kind,
                };
                let of = [self.source(a, kind)?, self.source(b, kind)?, self.source(c, sum)?];
                let to = self.register(to);
                Some(match kind.is_float() {
                    true => Operation::Fused { kind, rounding, to, of },
                    false => Operation::MulAdd { kind, wide, to, of },
                })
            }
            "bra" => Some(Operation::Jump { to: *self.labels.get(operands.first()?.as_str())? }),
            "bar" => Some(Operation::Barrier),
            "cp" => self.copy(&words, &operands),
            "ldmatrix" => {
                let [to, from] = operands.as_slice() else { return None };
                let known = words.contains(&"m8n8") && words.contains(&"shared") && kinds == [Type::U(16)];
                let from = self.address(from).filter(|_| known)?;
                let to = braced(to)?.iter().map(|name| self.register(name)).collect();
                Some(Operation::LoadMatrices { transposed: words.contains(&"trans"), to, from })
            }
            "mma" => {
                let ([to, a, b, c], [Type::F32, kind, other, Type::F32]) = (operands.as_slice(), kinds.as_slice())
                else {
                    return None;
                };
                let known = words.contains(&"m16n8k16") && kind == other && kind.bits() == 16;
                let mut registers = |text: &str, kind| -> Option<Vec<Source>> {
                    braced(text)?.iter().map(|name| self.source(name, kind)).collect()
                };
                let of = [registers(a, Type::U(32))?, registers(b, Type::U(32))?, registers(c, Type::F32)?];
                let to: Vec<u32> = braced(to)?.iter().map(|name| self.register(name)).collect();
                if !known || to.len() != 4 || of.each_ref().map(Vec::len) != [4, 2, 4] {
                    return None;
                }
                Some(Operation::MultiplyMatrices { kind: *kind, to, of })
            }
            "shfl" => {
                let [to, of, lanes, clamp, members] = operands.as_slice() else { return None };
                let whole = words.contains(&"bfly") && self.is_number(clamp) && self.is_number(members);
                let to = to.split('|').next().unwrap_or_default();
                let of = self.source(of, Type::U(32))?;
                let lanes = self.source(lanes, Type::U(32))?;
                whole.then(|| Operation::Butterfly { to: self.register(to), of, lanes })
            }
            "ret" | "exit" => Some(Operation::End),
            _ => self.arithmetic(&words, &kinds, rounding, &operands),
        }
    }

    /// A number or a register.
    fn is_number(&mut self, text: &str) -> bool {
        self.source(text, Type::U(32)).is_some()
    }

    fn moved(&mut self, operands: &[String], kind: Type) -> Option<Operation> {
        let [to, of] = operands else { return None };
        if let Some(parts) = braced(of) {
            let bits = kind.bits() / parts.len() as u32;
            let of = parts.iter().map(|part| self.source(part, Type::U(bits))).collect::<Option<_>>()?;
            return Some(Operation::Pack { to: self.register(to), of, bits });
        }
        if let Some(parts) = braced(to) {
            let bits = kind.bits() / parts.len() as u32;
            let to = parts.iter().map(|part| (part != "_").then(|| self.register(part))).collect();
            return Some(Operation::Unpack { to, of: self.source(of, kind)?, bits });
        }
        let of = self.source(of, kind)?;
        Some(Operation::Move { to: self.register(to), of })
    }

    fn load(&mut self, words: &[&str], kind: Type, operands: &[String]) -> Option<Operation> {
        let [to, from] = operands else { return None };
        let from = self.address(from)?;
        let to = braced(to).unwrap_or_else(|| vec![to.clone()]);
        let to = to.iter().map(|name| self.register(name)).collect();
        Some(Operation::Load { space: space(words), kind, to, from })
    }

    fn store(&mut self, words: &[&str], kind: Type, operands: &[String]) -> Option<Operation> {
        let [at, of] = operands else { return None };
        let at = self.address(at)?;
        let of = braced(of).unwrap_or_else(|| vec![of.clone()]);
        let of = of.iter().map(|value| self.source(value, kind)).collect::<Option<_>>()?;
        Some(Operation::Store { space: space(words), kind, at, of })
    }

    /// `cp.async.cg.shared.global [to], [from], bytes, there`, and what groups such and waits for
    /// groups.
    fn copy(&mut self, words: &[&str], operands: &[String]) -> Option<Operation> {
        match (words, operands) {
            (["cp", "async", "commit_group"], []) => Some(Operation::GroupCopies),
            (["cp", "async", "wait_group"], [but]) => Some(Operation::AwaitCopies { but: but.parse().ok()? }),
            (["cp", "async", "ca" | "cg", "shared", "global"], [to, from, bytes, there @ ..]) => {
                let (to, from) = (self.address(to)?, self.address(from)?);
                let bytes = bytes.parse::<usize>().ok().filter(|bytes| matches!(bytes, 4 | 8 | 16))?;
                let there = match there {
                    [] => None,
                    [there] => Some(self.source(there, Type::U(32))?),
                    _ => return None,
                };
                Some(Operation::CopyLater { to, from, bytes, there })
            }
            _ => None,
        }
    }

    fn atomic(&mut self, words: &[&str], kind: Type, operands: &[String]) -> Option<Operation> {
        let what = match () {
            () if words.contains(&"add") => Atomic::Add,
            () if words.contains(&"max") => Atomic::Max,
            () if words.contains(&"cas") => Atomic::CompareAndSwap,
            () => return None,
        };
        let [to, at, of @ ..] = operands else { return None };
        let at = self.address(at)?;
        let of = of.iter().map(|value| self.source(value, kind)).collect::<Option<_>>()?;
        Some(Operation::Atomic { what, space: space(words), kind, to: self.register(to), at, of })
    }

    fn arithmetic(
        &mut self,
        words: &[&str],
        kinds: &[Type],
        rounding: Rounding,
        operands: &[String],
    ) -> Option<Operation> {
        let kind = *kinds.first()?;
        if words.contains(&"cc") {
            return None;
        }
        match operands {
            [to, of] => {
                let what = match words[0] {
                    "neg" => One::Neg,
                    "abs" => One::Abs,
                    "not" => One::Not,
                    "ex2" => One::Exp2,
                    "lg2" => One::Log2,
                    "rcp" => One::Reciprocal,
                    "sqrt" => One::Sqrt,
                    "rsqrt" => One::ReciprocalSqrt,
                    "sin" => One::Sin,
                    "cos" => One::Cos,
                    "tanh" => One::Tanh,
                    "clz" => One::LeadingZeros,
                    "popc" => One::Population,
                    _ => return None,
                };
                let of = self.source(of, kind)?;
                Some(Operation::One { what, kind, to: self.register(to), of })
            }
            [to, a, b] => {
                let (is_nan, wide) = (words.contains(&"NaN"), words.contains(&"wide"));
                let what = match words[0] {
                    "add" => Two::Add,
                    "sub" => Two::Sub,
                    "mul" if wide => Two::MulWide,
                    "mul" if words.contains(&"hi") => Two::MulHigh,
                    "mul" => Two::Mul,
                    "div" => Two::Div,
                    "rem" => Two::Rem,
                    "min" if is_nan => Two::MinNan,
                    "max" if is_nan => Two::MaxNan,
                    "min" => Two::Min,
                    "max" => Two::Max,
                    "and" => Two::And,
                    "or" => Two::Or,
                    "xor" => Two::Xor,
                    "shl" => Two::Shl,
                    "shr" => Two::Shr,
                    "copysign" => Two::CopySign,
                    _ => return None,
                };
                // The shift distance is always 32 bits.
                let second = if matches!(what, Two::Shl | Two::Shr) { Type::U(32) } else { kind };
                let of = [self.source(a, kind)?, self.source(b, second)?];
                Some(Operation::Two { what, kind, rounding, to: self.register(to), of })
            }
            _ => None,
        }
    }

    fn address(&mut self, text: &str) -> Option<Address> {
        let inner = text.strip_prefix('[')?.strip_suffix(']')?.trim();
        let (base, offset) = match inner.split_once('+') {
            Some((base, offset)) => (base.trim(), offset.trim().parse().ok()?),
            None => (inner, 0),
        };
        Some(Address { base: self.source(base, Type::U(64))?, offset })
    }

    fn source(&mut self, text: &str, kind: Type) -> Option<Source> {
        if let Some(special) = special(text) {
            return Some(special);
        }
        if let Some(at) = self.symbols.get(text) {
            return Some(Source::Value(*at));
        }
        if text.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
            return number(text, kind).map(Source::Value);
        }
        Some(Source::Register(self.register(text)))
    }
}

fn space(words: &[&str]) -> Space {
    words
        .iter()
        .find_map(|word| match *word {
            "shared" => Some(Space::Shared),
            "local" => Some(Space::Local),
            "param" => Some(Space::Parameters),
            _ => None,
        })
        .unwrap_or(Space::Global)
}

fn rounding(words: &[&str]) -> Rounding {
    words
        .iter()
        .find_map(|word| match *word {
            "rz" | "rzi" => Some(Rounding::Zero),
            "rm" | "rmi" => Some(Rounding::Down),
            "rp" | "rpi" => Some(Rounding::Up),
            _ => None,
        })
        .unwrap_or(Rounding::Nearest)
}

/// Instructions with two numbers per register.
fn pair_type(words: &[&str]) -> Option<Type> {
    words.iter().find_map(|word| word.strip_suffix("x2").and_then(type_of))
}

fn comparison(word: &str) -> Option<Comparison> {
    let (order, or_unordered) = match word.strip_suffix('u') {
        Some(order) => (order, true),
        None => (word, false),
    };
    let order = match order {
        "eq" => Order::Eq,
        "ne" => Order::Ne,
        "lt" => Order::Lt,
        "le" => Order::Le,
        "gt" => Order::Gt,
        "ge" => Order::Ge,
        _ => return None,
    };
    Some(Comparison { order, or_unordered })
}

fn special(text: &str) -> Option<Source> {
    if text == "WARP_SZ" {
        return Some(Source::Value(32));
    }
    let (name, axis) = text.strip_prefix('%')?.split_once('.').unwrap_or((&text[1..], "x"));
    let axis = ["x", "y", "z"].iter().position(|known| *known == axis)?;
    Some(Source::Special(match name {
        "tid" => Special::Thread(axis),
        "ctaid" => Special::Block(axis),
        "ntid" => Special::BlockSize(axis),
        "nctaid" => Special::GridSize(axis),
        "laneid" => Special::Lane,
        _ => return None,
    }))
}

/// `{a, b}`.
fn braced(text: &str) -> Option<Vec<String>> {
    let inner = text.strip_prefix('{')?.strip_suffix('}')?;
    Some(inner.split(',').map(|part| part.trim().to_owned()).collect())
}

/// Splits at commas outside of braces.
fn operand_list(text: &str) -> Vec<String> {
    let mut operands = vec![String::new()];
    let mut depth = 0;
    for c in text.chars() {
        match c {
            ',' if depth == 0 => {
                operands.push(String::new());
                continue;
            }
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if let Some(last) = operands.last_mut() {
            last.push(c);
        }
    }
    operands.into_iter().map(|operand| operand.trim().to_owned()).filter(|operand| !operand.is_empty()).collect()
}

/// Bits of a number: `0f3F800000` and `0d..` are floats as bits, all others integers.
fn number(text: &str, kind: Type) -> Option<u64> {
    let hex = |digits: &str| u64::from_str_radix(digits.trim_end_matches(['U', 'u']), 16).ok();
    let lower = text.to_ascii_lowercase();
    if let Some(digits) = lower.strip_prefix("0f") {
        let single = f32::from_bits(hex(digits)? as u32);
        return Some(match kind {
            Type::F64 => f64::from(single).to_bits(),
            Type::F16 => f16::from_f32(single).to_bits().into(),
            Type::Bf16 => bf16::from_f32(single).to_bits().into(),
            _ => single.to_bits().into(),
        });
    }
    if let Some(digits) = lower.strip_prefix("0d") {
        return hex(digits);
    }
    let magnitude = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => hex(digits),
        None => text.trim_end_matches('u').parse().ok(),
    };
    let value = match lower.strip_prefix('-') {
        Some(rest) => magnitude(rest)?.wrapping_neg(),
        None => magnitude(&lower)?,
    };
    Some(match kind.bits() {
        64 => value,
        bits => value & ((1 << bits) - 1),
    })
}
