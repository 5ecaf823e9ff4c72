//! The part of Python's pickle that PyTorch writes a dictionary of tensors with.
//!
//! A pickle is a program for a stack machine that may call any Python function. This machine runs
//! nothing: it knows the few names that checkpoints need, and refuses every other by name.

use std::collections::{BTreeMap, HashMap};

use safetensors::Dtype;

/// A tensor as a pickle describes it: a view of a storage that lies elsewhere in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PickledTensor<'a> {
    /// The storage's name.
    pub(super) storage: &'a str,
    pub(super) dtype: Dtype,
    /// Elements of the storage.
    pub(super) storage_len: usize,
    /// The first element in the storage.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// Elements from one index to the next, for each dimension.
    pub(super) strides: Vec<usize>,
}

/// The most dimensions of a tensor, and the longest name, that are believed: what a pickle names
/// again and again must not grow with every time.
const MAX_RANK: usize = 8;
const MAX_NAME_LEN: usize = 1024;

/// The tensors of a pickled dictionary, by name; what else it holds is left out.
///
/// An error is a sentence about the pickle.
pub(super) fn read_tensors(pickle: &[u8]) -> Result<BTreeMap<&str, PickledTensor<'_>>, String> {
    let mut machine =
        Machine { rest: pickle, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    let top = machine.run()?;
    let Value::Dict(items) = &machine.values[top] else {
        return Err("holds no dictionary of tensors".to_string());
    };
    let tensors = items.iter().filter_map(|(key, value)| match (&machine.values[*key], &machine.values[*value]) {
        (Value::Text(name), Value::Tensor(tensor)) => Some((*name, tensor.clone())),
        _ => None,
    });
    Ok(tensors.collect())
}

/// The index of a value: stack, memo and containers share values by it, so that a value is never
/// copied however often a pickle names it.
type Id = usize;

#[derive(Debug)]
enum Value<'a> {
    Int(i64),
    Text(&'a str),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage {
        name: &'a str,
        dtype: Dtype,
        len: usize,
    },
    Tensor(PickledTensor<'a>),
    /// None, a truth value, a float, a list: nothing that describes a tensor.
    Other,
}

/// What a pickle may name.
#[derive(Debug, Clone, Copy)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Global {
    fn named(module: &str, name: &str) -> Result<Self, String> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "FloatStorage") => Self::Storage(Dtype::F32),
            ("torch", "HalfStorage") => Self::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Self::Storage(Dtype::BF16),
            ("torch", "DoubleStorage") => Self::Storage(Dtype::F64),
            ("torch", "LongStorage") => Self::Storage(Dtype::I64),
            ("torch", "IntStorage") => Self::Storage(Dtype::I32),
            ("torch", "ShortStorage") => Self::Storage(Dtype::I16),
            ("torch", "CharStorage") => Self::Storage(Dtype::I8),
            ("torch", "ByteStorage") => Self::Storage(Dtype::U8),
            ("torch", "BoolStorage") => Self::Storage(Dtype::BOOL),
            _ => return Err(format!("names `{module}.{name}`, which no checkpoint needs; nothing was run")),
        })
    }
}

struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack at the marks that are set.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// Runs to the end and gives the value on top. The opcodes are those of CPython's pickletools.
    fn run(&mut self) -> Result<Id, String> {
        loop {
            let opcode = self.take(1)?[0];
            match opcode {
                b'.' => return self.pop(),
                0x80 => drop(self.take(1)?),                          // PROTO
                0x95 => drop(self.take(8)?),                          // FRAME
                b'(' => self.marks.push(self.stack.len()),            // MARK
                b'0' => drop(self.pop()?),                            // POP
                b'N' | 0x88 | 0x89 | b']' => self.push(Value::Other), // NONE, NEWTRUE, NEWFALSE, EMPTY_LIST
                b'}' => self.push(Value::Dict(Vec::new())),           // EMPTY_DICT
                b')' => self.push(Value::Tuple(Vec::new())),          // EMPTY_TUPLE
                b'K' => self.push_int(1, false)?,                     // BININT1
                b'M' => self.push_int(2, false)?,                     // BININT2
                b'J' => self.push_int(4, true)?,                      // BININT
                0x8a => {
                    let len = self.take(1)?[0].into();
                    self.push_int(len, true)? // LONG1
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Other) // BINFLOAT
                }
                b'X' => self.push_text(4)?, // BINUNICODE
                0x8c => self.push_text(1)?, // SHORT_BINUNICODE
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Value::Global(Global::named(module, name)?)) // GLOBAL
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let global = Global::named(self.text(module)?, self.text(name)?)?;
                    self.push(Value::Global(global)) // STACK_GLOBAL
                }
                b'q' => {
                    let key = self.take(1)?[0].into();
                    self.memoize(key)? // BINPUT
                }
                b'r' => {
                    let key = self.u32()?;
                    self.memoize(key)? // LONG_BINPUT
                }
                0x94 => self.memoize(self.memo.len() as u32)?, // MEMOIZE
                b'h' => {
                    let key = self.take(1)?[0].into();
                    self.recall(key)? // BINGET
                }
                b'j' => {
                    let key = self.u32()?;
                    self.recall(key)? // LONG_BINGET
                }
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Tuple(items)) // TUPLE
                }
                0x85..=0x87 => {
                    let at = self.stack.len().checked_sub((opcode - 0x84).into()).ok_or_else(underflow)?;
                    let items = self.stack.split_off(at);
                    self.push(Value::Tuple(items)) // TUPLE1 to TUPLE3
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set_items(&[key, value])? // SETITEM
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set_items(&items)? // SETITEMS
                }
                b'a' => drop(self.pop()?),         // APPEND: lists describe no tensor
                b'e' => drop(self.pop_to_mark()?), // APPENDS
                b'Q' => self.load_storage()?,      // BINPERSID
                b'R' => self.call()?,              // REDUCE
                b'b' => drop(self.pop()?),         // BUILD: attributes, such as _metadata
                _ => return Err(format!("has the opcode {opcode:#04x}, which no checkpoint needs; nothing was run")),
            }
        }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or("ends in the middle")?;
        self.rest = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, String> {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(self.take(4)?);
        Ok(u32::from_le_bytes(bytes))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let len = self.rest.iter().position(|&byte| byte == b'\n').ok_or("ends in the middle")?;
        let line = self.take(len + 1)?;
        std::str::from_utf8(&line[..len]).map_err(|_| "has a name that is not UTF-8".to_string())
    }

    fn push(&mut self, value: Value<'a>) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn pop(&mut self) -> Result<Id, String> {
        self.stack.pop().ok_or_else(underflow)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().filter(|mark| *mark <= self.stack.len()).ok_or_else(underflow)?;
        Ok(self.stack.split_off(mark))
    }

    /// A little-endian integer of `len` bytes, signed or not.
    fn push_int(&mut self, len: usize, signed: bool) -> Result<(), String> {
        let bytes = self.take(len)?;
        if len > 8 {
            return Err(format!("has an integer of {len} bytes"));
        }
        let is_negative = signed && bytes.last().is_some_and(|last| last & 0x80 != 0);
        let fill = if is_negative { 0xff } else { 0 };
        let mut wide = [fill; 8];
        wide[..len].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)));
        Ok(())
    }

    /// A text behind its length, which takes `len_bytes`.
    fn push_text(&mut self, len_bytes: usize) -> Result<(), String> {
        let len = self.take(len_bytes)?.iter().rev().fold(0usize, |len, &byte| len << 8 | usize::from(byte));
        let text = std::str::from_utf8(self.take(len)?).map_err(|_| "has a text that is not UTF-8")?;
        if len > MAX_NAME_LEN {
            return Err(format!("has a name of {len} bytes"));
        }
        self.push(Value::Text(text));
        Ok(())
    }

    fn memoize(&mut self, key: u32) -> Result<(), String> {
        let top = *self.stack.last().ok_or_else(underflow)?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), String> {
        let id = *self.memo.get(&key).ok_or("recalls what it never stored")?;
        self.stack.push(id);
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), String> {
        let target = *self.stack.last().ok_or_else(underflow)?;
        let (pairs, []) = items.as_chunks::<2>() else { return Err("has a key without a value".to_string()) };
        match &mut self.values[target] {
            Value::Dict(dict) => dict.extend(pairs.iter().map(|[key, value]| (*key, *value))),
            _ => return Err("sets items of what is no dictionary".to_string()),
        }
        Ok(())
    }

    /// ("storage", its class, its name, its device, its elements) becomes a storage.
    fn load_storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let fields = self.tuple(id)?;
        let [tag, class, name, _device, len] = *fields else {
            return Err("refers to something outside of it that is no storage".to_string());
        };
        let (Value::Text("storage"), Value::Global(Global::Storage(dtype))) = (&self.values[tag], &self.values[class])
        else {
            return Err("refers to something outside of it that is no storage".to_string());
        };
        let storage = Value::Storage { name: self.text(name)?, dtype: *dtype, len: self.size(len)? };
        self.push(storage);
        Ok(())
    }

    /// Does what the call of a known function would.
    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Global(function) = self.values[function] else {
            return Err("calls what is no function".to_string());
        };
        let arguments = self.tuple(arguments)?;
        match (function, arguments) {
            (Global::OrderedDict, []) => self.push(Value::Dict(Vec::new())),
            // (storage, offset, shape, strides, requires_grad, hooks, ..)
            (Global::RebuildTensor, [storage, offset, shape, strides, ..]) => {
                let Value::Storage { name, dtype, len } = self.values[*storage] else {
                    return Err("makes a tensor of what is no storage".to_string());
                };
                let sizes = |id: Id| match self.tuple(id)? {
                    sizes if sizes.len() <= MAX_RANK => sizes.iter().map(|id| self.size(*id)).collect(),
                    sizes => Err(format!("has a tensor of {} dimensions", sizes.len())),
                };
                let tensor = PickledTensor {
                    storage: name,
                    dtype,
                    storage_len: len,
                    offset: self.size(*offset)?,
                    shape: sizes(*shape)?,
                    strides: sizes(*strides)?,
                };
                self.push(Value::Tensor(tensor));
            }
            // (tensor, requires_grad, hooks)
            (Global::RebuildParameter, [tensor, ..]) => {
                let tensor = *tensor;
                self.stack.push(tensor);
            }
            _ => return Err("calls a function with arguments it does not take".to_string()),
        }
        Ok(())
    }

    fn tuple(&self, id: Id) -> Result<&[Id], String> {
        match &self.values[id] {
            Value::Tuple(items) => Ok(items),
            _ => Err("has something else where a tuple should be".to_string()),
        }
    }

    fn text(&self, id: Id) -> Result<&'a str, String> {
        match self.values[id] {
            Value::Text(text) => Ok(text),
            _ => Err("has something else where a text should be".to_string()),
        }
    }

    fn size(&self, id: Id) -> Result<usize, String> {
        match self.values[id] {
            Value::Int(size) => usize::try_from(size).map_err(|_| format!("has the size {size}")),
            _ => Err("has something else where a size should be".to_string()),
        }
    }
}

fn underflow() -> String {
    "takes from an empty stack".to_string()
}
