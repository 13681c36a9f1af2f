//! A writer of GGUF files, version 3, tensor by tensor (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>):
//! candle's writer needs all tensors at once.
//!
//! ```text
//! "GGUF" 3 | tensors, pairs | pairs: key, type, value | tensors: name, dimensions, type, offset | padding | values
//! ```

use crate::export::safetensors::Counted;
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use std::io::{self, Write};
use std::path::Path;

/// Values of tensors begin at multiples of this number of bytes, the format's default.
const ALIGNMENT: usize = 32;

/// A tensor to write; its shape has the rows first, as elsewhere in this program.
#[derive(Debug, Clone)]
pub struct GgufEntry {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: GgmlDType,
}

impl GgufEntry {
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() / self.dtype.block_size() * self.dtype.type_size()
    }
}

/// Writes pairs and tensors; `values` is called with a tensor's number and must write as many bytes as its entry says.
pub fn write(
    path: &Path,
    pairs: &[(String, Value)],
    entries: &[&GgufEntry],
    out: &mut dyn Write,
    mut values: impl FnMut(usize, &mut dyn Write) -> Result<()>,
) -> Result<()> {
    let header = header(pairs, entries).map_err(Error::io(path))?;
    out.write_all(&header).map_err(Error::io(path))?;
    let mut end = header.len();
    for (i, entry) in entries.iter().enumerate() {
        pad(out, end).map_err(Error::io(path))?;
        let mut counted = Counted { out, bytes: 0 };
        values(i, &mut counted)?;
        end = counted.bytes;
        if end != entry.bytes() {
            let problem = format!("tensor `{}`: expected {} bytes, found {end}", entry.name, entry.bytes());
            return Err(Error::Checkpoint { path: path.to_path_buf(), problem });
        }
    }
    pad(out, end).map_err(Error::io(path))
}

fn pad(out: &mut dyn Write, written: usize) -> io::Result<()> {
    out.write_all(&[0; ALIGNMENT][..written.next_multiple_of(ALIGNMENT) - written])
}

/// Everything before the values, without the padding at the end.
fn header(pairs: &[(String, Value)], entries: &[&GgufEntry]) -> io::Result<Vec<u8>> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((entries.len() as u64).to_le_bytes());
    out.extend((pairs.len() as u64).to_le_bytes());
    for (key, value) in pairs {
        string(&mut out, key);
        out.extend(type_number(value).to_le_bytes());
        put(&mut out, value)?;
    }
    let mut offset = 0;
    for entry in entries {
        string(&mut out, &entry.name);
        out.extend((entry.shape.len() as u32).to_le_bytes());
        entry.shape.iter().rev().for_each(|dim| out.extend((*dim as u64).to_le_bytes()));
        out.extend(ggml_number(entry.dtype).to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += entry.bytes().next_multiple_of(ALIGNMENT);
    }
    Ok(out)
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &Value) -> io::Result<()> {
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => string(out, v),
        Value::Array(items) => {
            // The type of an empty list does not matter.
            let kind = items.first().map_or(4, type_number);
            if items.iter().any(|item| type_number(item) != kind) {
                return Err(io::Error::other("expected a list of values of one type"));
            }
            out.extend(kind.to_le_bytes());
            out.extend((items.len() as u64).to_le_bytes());
            items.iter().try_for_each(|item| put(out, item))?;
        }
    }
    Ok(())
}

/// `gguf_metadata_value_type`.
fn type_number(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}

/// `ggml_type`.
fn ggml_number(dtype: GgmlDType) -> u32 {
    match dtype {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q8_1 => 9,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::Q8K => 15,
        GgmlDType::BF16 => 30,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use candle_core::quantized::gguf_file::Content;
    use std::io::Cursor;

    #[test]
    fn candle_reads_what_is_written() {
        let list = Value::Array(vec![Value::String("a".into()), Value::String("ö".into())]);
        let pairs = [
            ("general.architecture".to_string(), Value::String("llama".into())),
            ("n".to_string(), Value::U32(7)),
            ("list".to_string(), list),
            ("yes".to_string(), Value::Bool(true)),
            ("x".to_string(), Value::F32(0.22)),
        ];
        let entry = |name: &str, shape: &[usize], dtype| GgufEntry {
            name: name.into(),
            shape: shape.to_vec(),
            dtype,
        };
        let entries = [entry("a", &[3], GgmlDType::F32), entry("b", &[2, 5], GgmlDType::BF16)];
        let entries: Vec<&GgufEntry> = entries.iter().collect();
        let mut file = Vec::new();
        write(Path::new("x"), &pairs, &entries, &mut file, |i, out| {
            let bytes: Vec<u8> = match i {
                0 => [1f32, 2.0, 3.0].iter().flat_map(|v| v.to_le_bytes()).collect(),
                _ => (0..10).flat_map(|v| half::bf16::from_f32(v as f32).to_le_bytes()).collect(),
            };
            out.write_all(&bytes).map_err(Error::io("x"))
        })
        .unwrap();
        let mut file = Cursor::new(file);
        let content = Content::read(&mut file).unwrap();
        assert_eq!(content.metadata["x"].to_f32().unwrap(), 0.22);
        assert_eq!(content.metadata["list"].to_vec().unwrap()[1].to_string().unwrap(), "ö");
        assert!(content.metadata["yes"].to_bool().unwrap() && content.metadata["n"].to_u32().unwrap() == 7);
        let mut read =
            |name| content.tensor(&mut file, name, &Device::Cpu).unwrap().dequantize(&Device::Cpu).unwrap();
        assert_eq!(read("a").to_vec1::<f32>().unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(read("b").to_vec2::<f32>().unwrap()[1], [5.0, 6.0, 7.0, 8.0, 9.0]);
    }
}
