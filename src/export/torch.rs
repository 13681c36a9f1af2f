//! A tensor in the format of `torch.save`: a zip archive of uncompressed files, the first of which is a pickle that
//! names the others.
//!
//! ```text
//! archive/data.pkl      _rebuild_tensor_v2(storage 0, offset 0, (rows, columns), strides, ...)
//! archive/byteorder     little
//! archive/data/0        the values
//! archive/version       3
//! ```
//!
//! The opcodes are those of Python's pickletools. The objects are those of torch/serialization.py that
//! `torch.load(weights_only=True)` accepts.

use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use std::io::{Cursor, Write};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// The file of a matrix [rows, columns] with the values `data` in `dtype`.
pub(crate) fn file(shape: [usize; 2], dtype: GgmlDType, data: &[u8]) -> Result<Vec<u8>> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::with_capacity(data.len() + 1024)));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let pickle = pickle(shape, storage(dtype)?);
    let failed = |error: zip::result::ZipError| Error::io("prompt embeddings")(error.into());
    for (name, bytes) in [
        ("archive/data.pkl", pickle.as_slice()),
        ("archive/byteorder", b"little"),
        ("archive/data/0", data),
        ("archive/version", b"3\n"),
    ] {
        zip.start_file(name, options).map_err(failed)?;
        zip.write_all(bytes).map_err(Error::io(name))?;
    }
    Ok(zip.finish().map_err(failed)?.into_inner())
}

fn storage(dtype: GgmlDType) -> Result<&'static str> {
    match dtype {
        GgmlDType::F32 => Ok("FloatStorage"),
        GgmlDType::F16 => Ok("HalfStorage"),
        GgmlDType::BF16 => Ok("BFloat16Storage"),
        _ => {
            Err(Error::Invalid("--type: expected f32, f16 or bf16 for prompt embeddings, found q8_0".into()))
        }
    }
}

fn pickle(shape: [usize; 2], storage: &str) -> Vec<u8> {
    let [rows, columns] = shape;
    let mut p = Pickle(vec![0x80, 2]); // PROTO 2
    p.global("torch._utils", "_rebuild_tensor_v2");
    p.op(b"((").string("storage").global("torch", storage).string("0").string("cpu");
    p.int(rows * columns).op(b"tQ"); // TUPLE, BINPERSID: the storage
    p.int(0).int(rows).int(columns).op(b"\x86"); // TUPLE2: the shape
    p.int(columns).int(1).op(b"\x86"); // the strides
    p.op(b"\x89").global("collections", "OrderedDict").op(b")R"); // no gradient, no hooks
    p.op(b"tR."); // TUPLE, REDUCE, STOP
    p.0
}

struct Pickle(Vec<u8>);

impl Pickle {
    fn op(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    fn global(&mut self, module: &str, name: &str) -> &mut Self {
        self.op(format!("c{module}\n{name}\n").as_bytes())
    }

    /// BINUNICODE.
    fn string(&mut self, text: &str) -> &mut Self {
        self.op(b"X").op(&(text.len() as u32).to_le_bytes()).op(text.as_bytes())
    }

    /// LONG1 of 9 bytes: any size, never read as negative.
    fn int(&mut self, value: usize) -> &mut Self {
        self.op(b"\x8a\x09").op(&(value as u64).to_le_bytes()).op(b"\0")
    }
}
