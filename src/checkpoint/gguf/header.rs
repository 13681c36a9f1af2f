//! The header of a GGUF file.

use std::fs::File;
use std::io::Cursor;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Content;
use memmap2::Mmap;

use crate::checkpoint::content;
use crate::{Error, Result};

/// Maps the file and reads its header.
pub(super) fn open_header(path: &Path) -> Result<(Mmap, Content)> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the mapping is read only. That nobody shortens the file meanwhile is part of the contract of `GgufFile`,
    // as in every program that maps checkpoints.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    content::expect(path, &map, "a GGUF file", content::GGUF)?;
    let content = Content::read(&mut Cursor::new(&map[..])).map_err(|e| header_error(path, &e))?;
    Ok((map, content))
}

/// Checks that the data of every tensor lies inside the file.
pub(super) fn check_extents(path: &Path, content: &Content, file_size: u64) -> Result<()> {
    for (name, info) in &content.tensor_infos {
        let elements = info.shape.dims().iter().try_fold(1u64, |n, dim| n.checked_mul(*dim as u64));
        let (block, bytes) = (info.ggml_dtype.block_size() as u64, info.ggml_dtype.type_size() as u64);
        let end = elements
            .and_then(|elements| elements.div_ceil(block).checked_mul(bytes))
            .and_then(|size| size.checked_add(info.offset)?.checked_add(content.tensor_data_offset));
        if end.is_none_or(|end| end > file_size) {
            let end = end.map_or("more than any file".to_string(), |end| end.to_string());
            let problem = format!(
                "tensor `{name}`: expected its data up to byte {end}, found a file of {file_size} bytes; \
                 download it again"
            );
            return Err(Error::Checkpoint { path: path.to_path_buf(), problem });
        }
    }
    Ok(())
}

/// candle's error about the header; for an unknown quantisation type with the type's name.
fn header_error(path: &Path, error: &candle_core::Error) -> Error {
    let text = error.to_string();
    let unknown_type = text.split("unknown dtype for tensor ").nth(1).map(|rest| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits
    });
    let Some(number) = unknown_type else {
        let problem = format!("expected a whole GGUF file: {text}");
        return Error::Checkpoint { path: path.to_path_buf(), problem };
    };
    // https://github.com/ggml-org/ggml/blob/master/include/ggml.h, `enum ggml_type`
    let name = match number.as_str() {
        "16" => "IQ2_XXS",
        "17" => "IQ2_XS",
        "18" => "IQ3_XXS",
        "19" => "IQ1_S",
        "20" => "IQ4_NL",
        "21" => "IQ3_S",
        "22" => "IQ2_S",
        "23" => "IQ4_XS",
        "29" => "IQ1_M",
        "34" => "TQ1_0",
        "35" => "TQ2_0",
        "39" => "MXFP4",
        _ => "unknown",
    };
    let known = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];
    Error::Unsupported {
        path: path.to_path_buf(),
        what: format!("quantisation type {number} ({name})"),
        hint: format!("take a file of one of {known:?}"),
    }
}
