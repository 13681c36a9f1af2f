use super::*;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::Value;

fn golden() -> Vec<Value> {
    let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/torch_files.json")).unwrap();
    golden["cases"].as_array().unwrap().clone()
}

fn file(case: &Value) -> Vec<u8> {
    BASE64_STANDARD.decode(case["file"].as_str().unwrap()).unwrap()
}

/// What torch itself saved (tests/golden/torch_files.py).
#[test]
fn tensors_are_those_that_torch_saved() {
    let cases = golden();
    assert!(cases.len() >= 20);
    for case in cases {
        let (name, read) = (&case["name"], read(&file(&case)));
        let Some(values) = case["values"].as_array() else {
            let message = read.unwrap_err().to_string();
            assert!(message.starts_with("expected a tensor as torch.save writes it"), "{name}: {message}");
            continue;
        };
        let tensor = read.unwrap_or_else(|error| panic!("{name}: {error}"));
        let shape: Vec<usize> =
            case["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        assert_eq!(tensor.dims(), shape, "{name}");
        let found: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        let expected: Vec<f32> = values.iter().map(|value| value.as_f64().unwrap() as f32).collect();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn own_files_are_read_back() {
    use candle_core::quantized::GgmlDType;
    let bytes: Vec<u8> = [1.5f32, -2.0, 0.25, 8.0].into_iter().flat_map(f32::to_le_bytes).collect();
    let file = crate::export::torch::file([2, 2], GgmlDType::F32, &bytes).unwrap();
    assert_eq!(read(&file).unwrap().to_vec2::<f32>().unwrap(), [[1.5, -2.0], [0.25, 8.0]]);
}

/// Whatever the bytes, an answer comes, and it is no panic.
#[test]
fn broken_files_are_errors() {
    let whole = file(&golden()[0]);
    for length in (0..whole.len()).step_by(7) {
        read(&whole[..length]).unwrap_err();
    }
    let start = whole.windows(2).position(|bytes| bytes == [0x80, 2]).unwrap();
    for place in start..start + 220 {
        for byte in [0, b'(', b't', b'R', b'Q', b'h', b'.', 0x85, 0xff] {
            let mut broken = whole.clone();
            broken[place] = byte;
            drop(read(&broken));
        }
    }
}

fn layout_of(pickle: &[u8]) -> Result<TensorLayout> {
    Machine::default().run(pickle)
}

#[test]
fn pickles_of_anything_else_are_refused_and_run_nothing() {
    let message = |pickle: &[u8]| layout_of(pickle).unwrap_err().to_string();
    assert!(
        message(b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00evilt\x52.")
            .contains("found an object of os.system")
    );
    assert!(message(b"\x80\x02(lp0\n.").contains("found a list"));
    assert!(message(b"\x80\x02i").contains("instruction 0x69"));
    assert!(message(b"\x80\x02").contains("ends too early"));
    assert!(message(b"R").contains("more than it has"));
    assert!(message(b"h\x05.").contains("did not note"));
    assert!(message(b"X\xff\xff\xff\xffabc").contains("ends too early"));
    // A tuple of itself, and again: no copy is made of what is noted.
    let mut doubling = b")q\0".to_vec();
    (0..1000).for_each(|_| doubling.extend(b"h\0h\0\x86q\0"));
    doubling.push(b'.');
    assert!(message(&doubling).contains("another object"));
}

#[test]
fn shapes_beyond_the_storage_are_refused() {
    let layout = |shape: &[usize], strides: &[usize], offset| TensorLayout {
        storage: "FloatStorage",
        key: "0".into(),
        offset,
        shape: shape.to_vec(),
        strides: strides.to_vec(),
    };
    let bytes = [0u8; 24];
    assert!(layout(&[2, 3], &[3, 1], 0).tensor(&bytes).is_ok());
    for (shape, strides, offset) in [
        (&[2, 3][..], &[3, 1][..], 1),
        (&[2, 4], &[3, 1], 0),
        (&[usize::MAX, usize::MAX], &[1, 1], 0),
        (&[1, 2], &[usize::MAX, usize::MAX], 0),
        (&[1 << 20, 1], &[0, 1], 0),
        (&[1, 1], &[1, 1], usize::MAX),
    ] {
        assert!(layout(shape, strides, offset).tensor(&bytes).is_err(), "{shape:?} {strides:?} {offset}");
    }
}
