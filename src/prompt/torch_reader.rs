//! Reads one tensor of a file that `torch.save` wrote, whose bytes anybody may have sent.
//!
//! The pickle inside is a program for a stack machine. Of its instructions those are followed that a tensor needs, and no
//! object is made but tensors: nothing is run. What is read is bounded by `PICKLE` and by the file's own length.

use crate::{Error, Result};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use std::collections::HashMap;
use std::io::{Cursor, Read};
use zip::ZipArchive;

/// Most bytes of the pickle; a tensor's has some hundred.
const PICKLE: u64 = 4096;
/// Most dimensions.
const DIMENSIONS: usize = 8;

/// The tensor in a file, as f32.
///
/// # Errors
/// [`Error::Invalid`] of what is no such file: an archive that is broken, a pickle of something else than a tensor, a
/// tensor beyond its storage or of another type than f16, bf16, f32 and f64.
pub fn read(file: &[u8]) -> Result<Tensor> {
    let mut archive =
        ZipArchive::new(Cursor::new(file)).map_err(|error| invalid(format!("the archive: {error}")))?;
    let names: Vec<String> = archive.file_names().flatten().map(Into::into).collect();
    let Some(name) = names.iter().find(|name| name.ends_with("/data.pkl")) else {
        return Err(invalid("found no data.pkl in the archive"));
    };
    let folder = name.trim_end_matches("data.pkl");
    let pickle = entry(&mut archive, name, PICKLE)?;
    let layout = Machine::default().run(&pickle)?;
    let order = format!("{folder}byteorder");
    if names.contains(&order) && entry(&mut archive, &order, 16)? != b"little" {
        return Err(invalid("expected values in little-endian order, found another"));
    }
    let values = entry(&mut archive, &format!("{folder}data/{}", layout.key), file.len() as u64)?;
    layout.tensor(&values)
}

fn entry(archive: &mut ZipArchive<Cursor<&[u8]>>, name: &str, most: u64) -> Result<Vec<u8>> {
    let file = archive.by_name(name).map_err(|error| invalid(format!("{name}: {error}")))?;
    if file.size() > most {
        return Err(invalid(format!("{name}: expected at most {most} bytes, found {}", file.size())));
    }
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes).map_err(|error| invalid(format!("{name}: {error}")))?;
    Ok(bytes)
}

fn invalid(problem: impl Into<String>) -> Error {
    Error::Invalid(format!("expected a tensor as torch.save writes it: {}", problem.into()))
}

/// Where a tensor's values are.
#[derive(Debug)]
struct TensorLayout {
    storage: &'static str,
    key: String,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl TensorLayout {
    /// The values, the last dimension's one after the other.
    fn tensor(&self, bytes: &[u8]) -> Result<Tensor> {
        let stored: Vec<f32> = match self.storage {
            "FloatStorage" => numbers(bytes, f32::from_le_bytes),
            "DoubleStorage" => numbers(bytes, |value| f64::from_le_bytes(value) as f32),
            "HalfStorage" => numbers(bytes, |value| f16::from_le_bytes(value).to_f32()),
            _ => numbers(bytes, |value| bf16::from_le_bytes(value).to_f32()),
        };
        let count = self.shape.iter().try_fold(1usize, |n, size| n.checked_mul(*size));
        let last = self.shape.iter().zip(&self.strides).try_fold(self.offset, |at, (size, stride)| {
            at.checked_add(size.saturating_sub(1).checked_mul(*stride)?)
        });
        // A stride of 0 repeats values, which may be many of few.
        let (Some(count), Some(last)) = (count.filter(|count| *count <= stored.len()), last) else {
            return Err(invalid(format!(
                "a shape {:?} is larger than its {} values",
                self.shape,
                stored.len()
            )));
        };
        if count > 0 && last >= stored.len() {
            return Err(invalid(format!("value {last} lies beyond the {} of its storage", stored.len())));
        }
        let mut values = Vec::with_capacity(count);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..count {
            let place: usize = index.iter().zip(&self.strides).map(|(i, stride)| i * stride).sum();
            values.push(stored[self.offset + place]);
            for (i, size) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
        Ok(Tensor::from_vec(values, self.shape.as_slice(), &Device::Cpu)?)
    }
}

fn numbers<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|chunk| number(*chunk)).collect()
}

/// A value on the machine's stack.
#[derive(Debug)]
enum Item {
    Mark,
    Text(String),
    Class(String),
    Number(i64),
    Tuple(Vec<Item>),
    Storage {
        class: &'static str,
        key: String,
    },
    Tensor(TensorLayout),
    /// What a tensor does not depend on.
    Other,
}

/// The storages that are known, by their classes.
const STORAGES: [&str; 4] = ["FloatStorage", "DoubleStorage", "HalfStorage", "BFloat16Storage"];

/// The machine of Python's pickletools, as far as it goes.
#[derive(Default)]
struct Machine {
    stack: Vec<Item>,
    memo: HashMap<u32, Item>,
}

impl Machine {
    fn run(mut self, pickle: &[u8]) -> Result<TensorLayout> {
        let mut rest = pickle;
        loop {
            let [code] = take(&mut rest)?;
            match code {
                0x80 => take::<1>(&mut rest).map(drop)?,
                b'(' => self.stack.push(Item::Mark),
                b')' => self.stack.push(Item::Tuple(Vec::new())),
                b'N' | 0x88 | 0x89 | b'}' => self.stack.push(Item::Other),
                b'c' => {
                    let name = format!("{}.{}", line(&mut rest)?, line(&mut rest)?);
                    self.stack.push(Item::Class(name));
                }
                b'X' | 0x8c | b'K' | b'M' | b'J' | 0x8a => self.push_value(code, &mut rest)?,
                b'q' => {
                    let [place] = take(&mut rest)?;
                    self.remember(place.into());
                }
                b'r' => self.remember(u32::from_le_bytes(take(&mut rest)?)),
                0x94 => self.remember(self.memo.len() as u32),
                b'h' => {
                    let [place] = take(&mut rest)?;
                    self.recall(place.into())?;
                }
                b'j' => self.recall(u32::from_le_bytes(take(&mut rest)?))?,
                0x85..=0x87 => self.tuple(usize::from(code - 0x84))?,
                b't' => {
                    let mark = self.stack.iter().rposition(|item| matches!(item, Item::Mark));
                    let mark = mark.ok_or_else(|| invalid("the pickle takes more than it has"))?;
                    let items = self.stack.split_off(mark + 1);
                    self.stack[mark] = Item::Tuple(items);
                }
                b'Q' => self.storage()?,
                b'R' => self.reduce()?,
                b'b' => drop(self.pop()?),
                b'.' => {
                    return match self.pop()? {
                        Item::Tensor(layout) => Ok(layout),
                        _ => Err(invalid("found another object in the file")),
                    };
                }
                b's' | b'u' | b'd' => return Err(invalid("found a dictionary, and no tensor alone")),
                b']' | b'l' => return Err(invalid("found a list, and no tensor alone")),
                other => return Err(invalid(format!("found the pickle instruction {other:#04x}"))),
            }
        }
    }

    /// Pushes the text or number that follows an instruction.
    fn push_value(&mut self, code: u8, rest: &mut &[u8]) -> Result<()> {
        let item = match code {
            b'X' => {
                let length = u32::from_le_bytes(take(rest)?) as usize;
                Item::Text(text(rest, length)?)
            }
            0x8c => {
                let [length] = take(rest)?;
                Item::Text(text(rest, length.into())?)
            }
            b'K' => {
                let [number] = take(rest)?;
                Item::Number(number.into())
            }
            b'M' => Item::Number(u16::from_le_bytes(take(rest)?).into()),
            b'J' => Item::Number(i32::from_le_bytes(take(rest)?).into()),
            _ => Item::Number(long(rest)?),
        };
        self.stack.push(item);
        Ok(())
    }

    fn pop(&mut self) -> Result<Item> {
        self.stack.pop().ok_or_else(|| invalid("the pickle takes more than it has"))
    }

    /// Notes the item on top. A copy of a large item could be made of many again, so there is none.
    fn remember(&mut self, place: u32) {
        let item = match self.stack.last() {
            Some(Item::Text(text)) => Item::Text(text.clone()),
            Some(Item::Class(name)) => Item::Class(name.clone()),
            Some(Item::Number(number)) => Item::Number(*number),
            _ => Item::Other,
        };
        self.memo.insert(place, item);
    }

    fn recall(&mut self, place: u32) -> Result<()> {
        let item = match self.memo.get(&place) {
            Some(Item::Text(text)) => Item::Text(text.clone()),
            Some(Item::Class(name)) => Item::Class(name.clone()),
            Some(Item::Number(number)) => Item::Number(*number),
            Some(_) => Item::Other,
            None => return Err(invalid("the pickle names an item that it did not note")),
        };
        self.stack.push(item);
        Ok(())
    }

    fn tuple(&mut self, size: usize) -> Result<()> {
        if size > self.stack.len() {
            return Err(invalid("the pickle takes more than it has"));
        }
        let items = self.stack.split_off(self.stack.len() - size);
        self.stack.push(Item::Tuple(items));
        Ok(())
    }

    /// A persistent id: ("storage", class, key, device, size).
    fn storage(&mut self) -> Result<()> {
        let Item::Tuple(id) = self.pop()? else { return Err(invalid("found a storage without an id")) };
        let Ok([Item::Text(kind), Item::Class(class), Item::Text(key), Item::Text(_), Item::Number(_)]) =
            <[Item; 5]>::try_from(id)
        else {
            return Err(invalid("found a storage of another form"));
        };
        let known = STORAGES.into_iter().find(|name| class == format!("torch.{name}"));
        match known.filter(|_| kind == "storage") {
            Some(class) => self.stack.push(Item::Storage { class, key }),
            None => return Err(invalid(format!("expected f16, bf16, f32 or f64 values, found {class}"))),
        }
        Ok(())
    }

    /// A call: of what makes a tensor or a parameter, or of what a tensor carries along.
    fn reduce(&mut self) -> Result<()> {
        let (Item::Tuple(mut arguments), Item::Class(class)) = (self.pop()?, self.pop()?) else {
            return Err(invalid("found a call of no class"));
        };
        let made = match class.as_str() {
            "torch._utils._rebuild_tensor_v2" => Item::Tensor(layout(arguments)?),
            "torch._utils._rebuild_parameter" if !arguments.is_empty() => arguments.swap_remove(0),
            "collections.OrderedDict" => Item::Other,
            _ => return Err(invalid(format!("found an object of {class}"))),
        };
        self.stack.push(made);
        Ok(())
    }
}

/// (storage, offset, shape, strides, requires_grad, hooks).
fn layout(arguments: Vec<Item>) -> Result<TensorLayout> {
    let mut arguments = arguments.into_iter();
    let found = (arguments.next(), arguments.next(), arguments.next(), arguments.next());
    let (
        Some(Item::Storage { class, key }),
        Some(Item::Number(offset)),
        Some(Item::Tuple(shape)),
        Some(Item::Tuple(strides)),
    ) = found
    else {
        return Err(invalid("found a tensor of another form"));
    };
    let sizes = |items: Vec<Item>| {
        let size = |item| match item {
            Item::Number(number) => usize::try_from(number).ok(),
            _ => None,
        };
        items.into_iter().map(size).collect::<Option<Vec<usize>>>()
    };
    match (usize::try_from(offset), sizes(shape), sizes(strides)) {
        (Ok(offset), Some(shape), Some(strides))
            if shape.len() == strides.len() && shape.len() <= DIMENSIONS =>
        {
            Ok(TensorLayout { storage: class, key, offset, shape, strides })
        }
        _ => Err(invalid("found sizes that are none")),
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N]> {
    let (first, after) = rest.split_first_chunk().ok_or_else(|| invalid("the pickle ends too early"))?;
    *rest = after;
    Ok(*first)
}

fn text(rest: &mut &[u8], length: usize) -> Result<String> {
    let (bytes, after) = rest.split_at_checked(length).ok_or_else(|| invalid("the pickle ends too early"))?;
    *rest = after;
    String::from_utf8(bytes.to_vec()).map_err(|_| invalid("found a text that is not UTF-8"))
}

fn line(rest: &mut &[u8]) -> Result<String> {
    let end = rest.iter().position(|byte| *byte == b'\n');
    let end = end.ok_or_else(|| invalid("the pickle ends too early"))?;
    let line = text(rest, end)?;
    *rest = &rest[1..];
    Ok(line)
}

/// LONG1: a length, and so many bytes, of which as many count as an i64 has.
fn long(rest: &mut &[u8]) -> Result<i64> {
    let [length] = take(rest)?;
    let (bytes, after) =
        rest.split_at_checked(length.into()).ok_or_else(|| invalid("the pickle ends too early"))?;
    *rest = after;
    let sign = if bytes.last().is_some_and(|byte| *byte >= 0x80) { 0xff } else { 0 };
    if bytes.iter().skip(8).any(|byte| *byte != sign) {
        return Err(invalid("found a number beyond 64 bits"));
    }
    let mut number = [sign; 8];
    number.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
    Ok(i64::from_le_bytes(number))
}

#[cfg(test)]
mod tests;
