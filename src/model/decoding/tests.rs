//! Padded steps against unpadded ones.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::model::Dtypes;
use crate::ops::gpu::{self, emulated::emulate};
use crate::ops::testing::{Tolerance, assert_close};
use candle_core::{DType, Device};
use std::ops::Range;
use std::path::Path;

const COUNTS: [usize; 6] = [1, 2, 3, 5, 8, 9];

fn model() -> Decoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
}

/// A sequence's next token, after `filled` others and a prefix.
fn next<'a>(token: &'a [u32], prefix: &Range<usize>, own: &Range<usize>, filled: usize) -> Continuation<'a> {
    Continuation {
        tokens: token,
        prefix: prefix.clone(),
        first_position: 0,
        own: own.clone(),
        filled,
        targets: 1,
    }
}

/// Logits of three decoding steps of the first `count` of `all` sequences, half of which follow a prefix; by `decoding`, or by
/// passes as they are.
fn steps(
    model: &Decoder,
    (count, all): (usize, usize),
    mut decoding: Option<&mut Decoding>,
) -> Result<Vec<Tensor>> {
    let mut cache = KvCache::with_padding(model, 100, Decoding::PADDING_ROWS)?;
    let prompts = model.no_prompts()?;
    let prefix = cache.allocate(3).expect("rows of the prefix");
    let batch = cache.pack(&[Continuation { tokens: &[5, 6, 7], ..next(&[], &(0..0), &prefix, 0) }])?;
    model.infer(&batch, &prompts, &mut cache)?;
    let sequences: Vec<_> = (0..all).map(|_| cache.allocate(6).expect("rows of a sequence")).collect();
    let prefix_of = |i: usize| if i < all.div_ceil(2) { prefix.clone() } else { 0..0 };
    let texts: Vec<[u32; 2]> = (0..all as u32).map(|i| [i + 1, 2 * i + 3]).collect();
    let text = |(i, own): (usize, &Range<usize>)| Continuation {
        targets: 2,
        ..next(&texts[i], &prefix_of(i), own, 0)
    };
    let batch = cache.pack(&sequences.iter().enumerate().map(text).collect::<Vec<_>>())?;
    model.infer(&batch, &prompts, &mut cache)?;
    let mut logits = Vec::new();
    for step in 0..3 {
        let tokens: Vec<[u32; 1]> = (0..count).map(|i| [(7 * i + 11 * step) as u32 % 90]).collect();
        let one = |(i, own): (usize, &Range<usize>)| next(&tokens[i], &prefix_of(i), own, 2 + step);
        let all: Vec<Continuation> = sequences.iter().take(count).enumerate().map(one).collect();
        logits.push(match &mut decoding {
            Some(decoding) => {
                let made = decoding.run(model, (&prompts, &mut cache), &all)?.expect("a decoding step");
                assert_eq!(made.tokens.to_vec1::<u32>()?, made.logits.argmax(D::Minus1)?.to_vec1::<u32>()?);
                made.logits
            }
            None => {
                let batch = cache.pack(&all)?;
                model.logits(&model.infer(&batch, &prompts, &mut cache)?)?
            }
        });
    }
    Ok(logits)
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn buckets_are_powers_of_two_up_to_128() {
    assert_eq!([1, 2, 3, 5, 64, 65, 128].map(bucket), [1, 2, 4, 8, 64, 128, 128].map(Some));
    assert_eq!([0, 129].map(bucket), [None, None]);
    let most = (1..=MOST).map(|n| bucket(n).unwrap() - n).max();
    assert_eq!(most, Some(Decoding::PADDING_ROWS));
}

/// A sequence's logits do not depend on the rows that pad the step: they are those of a step of as many sequences, bit for bit.
/// A step of another number of sequences has other last digits, since a product of more rows adds up in another order, padded or
/// not.
#[test]
fn padding_changes_nothing_but_the_number_of_rows() -> Result<()> {
    let model = model();
    for count in COUNTS {
        let rows = bucket(count).expect("a bucket");
        let found = steps(&model, (count, rows), Some(&mut Decoding::padded()))?;
        let as_many = steps(&model, (rows, rows), None)?;
        let unpadded = steps(&model, (count, rows), None)?;
        for ((found, as_many), unpadded) in found.iter().zip(&as_many).zip(&unpadded) {
            assert!(values(found) == values(&as_many.narrow(0, 0, count)?), "{count} sequences");
            assert_close("logits", found, unpadded, Tolerance::F32);
        }
    }
    Ok(())
}

/// The same by the kernels, whose blocks are others: with empty tiles, and with all threads' and blocks' orders reversed.
#[test]
fn padded_steps_have_the_same_logits_by_the_kernels() -> Result<()> {
    let model = model();
    for order in [0, 1] {
        emulate(order, || {
            for count in [1, 3, 5] {
                let expected = steps(&model, (count, count), None)?;
                let found = steps(&model, (count, count), Some(&mut Decoding::padded()))?;
                for (a, b) in found.iter().zip(&expected) {
                    assert_close("logits", a, b, Tolerance::F32);
                }
            }
            Ok::<_, crate::Error>(())
        })?;
    }
    Ok(())
}

/// What a step reads of the host is in one buffer of the bucket, whatever the sequences are.
#[test]
fn inputs_of_a_bucket_are_one_buffer_that_is_written_once_a_step() -> Result<()> {
    let model = model();
    emulate(0, || {
        let mut decoding = Decoding::padded();
        for count in [5, 8, 6] {
            steps(&model, (count, count), Some(&mut decoding))?;
        }
        let buffer = |decoding: &Decoding| decoding.buckets[&8].inputs.as_ref().map(Tensor::id);
        let first = buffer(&decoding);
        let (uploads, writes) = (gpu::uploads(), gpu::writes());
        steps(&model, (7, 7), Some(&mut decoding))?;
        assert_eq!(buffer(&decoding), first);
        assert_eq!(decoding.buckets.keys().collect::<Vec<_>>(), [&8]);
        // Before the steps, two passes upload their lists one by one.
        let before = {
            let now = gpu::uploads();
            steps(&model, (7, 7), None)?;
            gpu::uploads() - now
        };
        assert!(gpu::uploads() - uploads < 2 * before);
        assert_eq!(gpu::writes() - writes, 3, "one a step");
        Ok(())
    })
}

#[test]
fn steps_that_are_no_decoding_run_as_other_passes() -> Result<()> {
    let model = model();
    let mut cache = KvCache::with_padding(&model, 300, Decoding::PADDING_ROWS)?;
    let prompts = model.no_prompts()?;
    let mut decoding = Decoding::padded();
    let own: Vec<_> = (0..129).map(|_| cache.allocate(2).expect("two rows")).collect();
    let one = |own: &Range<usize>| next(&[3], &(0..0), own, 0);
    let mut run =
        |next: &[Continuation]| decoding.run(&model, (&prompts, &mut cache), next).map(|made| made.is_some());
    assert!(run(&[one(&own[0])])? && run(&own[..128].iter().map(one).collect::<Vec<_>>())?);
    assert!(!run(&own.iter().map(one).collect::<Vec<_>>())?, "129 sequences");
    assert!(!run(&[one(&own[0]), Continuation { tokens: &[3, 4], ..one(&own[1]) }])?, "a text of two tokens");
    assert!(!run(&[Continuation { targets: 0, ..one(&own[0]) }])?, "a row without logits");
    decoding.stop(&model)?;
    assert!(decoding.run(&model, (&prompts, &mut cache), &[one(&own[0])])?.is_none());
    Ok(())
}
