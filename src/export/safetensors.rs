//! A writer of safetensors files, tensor by tensor: the crate's own writer needs all values at once.
//!
//! ```text
//! length of the header, u64 | header, JSON, padded to 8 bytes | values
//! ```

use crate::{Error, Result};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;

/// A tensor to write.
#[derive(Debug, Clone)]
pub(super) struct SafetensorsEntry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl SafetensorsEntry {
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Puts tensors in the order of the file: types with more bytes come first, so that all values are aligned.
pub(super) fn order(entries: &mut [SafetensorsEntry]) {
    entries.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
}

/// Writes `entries` in this order; `values` must write as many bytes of an entry as it says.
pub(super) fn write(
    path: &Path,
    entries: &[SafetensorsEntry],
    out: &mut dyn Write,
    mut values: impl FnMut(&SafetensorsEntry, &mut dyn Write) -> Result<()>,
) -> Result<()> {
    // transformers refuses a file that does not name its framework.
    let mut header = Map::from_iter([("__metadata__".to_string(), json!({"format": "pt"}))]);
    let mut end = 0;
    for entry in entries {
        let start = end;
        end += entry.bytes();
        let dtype = serde_json::to_value(entry.dtype).unwrap_or(Value::Null);
        let about = json!({"dtype": dtype, "shape": entry.shape, "data_offsets": [start, end]});
        header.insert(entry.name.clone(), about);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let io = |result: std::io::Result<()>| result.map_err(Error::io(path));
    io(out.write_all(&(header.len() as u64).to_le_bytes()))?;
    io(out.write_all(&header))?;
    for entry in entries {
        let mut counted = Counted { out, bytes: 0 };
        values(entry, &mut counted)?;
        if counted.bytes != entry.bytes() {
            let problem =
                format!("tensor `{}`: expected {} bytes, found {}", entry.name, entry.bytes(), counted.bytes);
            return Err(Error::Checkpoint { path: path.to_path_buf(), problem });
        }
    }
    Ok(())
}

/// Counts the bytes that are written.
pub(super) struct Counted<'a> {
    pub out: &'a mut dyn Write,
    pub bytes: usize,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.bytes += written;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    #[test]
    fn is_read_by_the_crate() {
        let entry = |name: &str, dtype, shape: &[usize]| SafetensorsEntry {
            name: name.into(),
            dtype,
            shape: shape.to_vec(),
        };
        let mut entries = [entry("a", Dtype::BF16, &[3]), entry("b", Dtype::F32, &[2, 1])];
        order(&mut entries);
        let mut file = Vec::new();
        let values = |entry: &SafetensorsEntry, out: &mut dyn Write| {
            let byte = entry.name.as_bytes()[0];
            out.write_all(&vec![byte; entry.bytes()]).map_err(Error::io("x"))
        };
        write(Path::new("x"), &entries, &mut file, values).unwrap();
        let read = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.tensor("a").unwrap().data(), b"aaaaaa");
        let b = read.tensor("b").unwrap();
        assert_eq!((b.data(), b.shape(), b.dtype()), (&b"bbbbbbbb"[..], &[2, 1][..], Dtype::F32));
        let short = |_: &SafetensorsEntry, out: &mut dyn Write| out.write_all(b"1").map_err(Error::io("x"));
        assert!(write(Path::new("x"), &entries, &mut Vec::new(), short).is_err());
    }
}
