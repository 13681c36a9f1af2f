//! The cases of shared-prefix attention: several prefixes, sequences of odd lengths, queries of some rows only,
//! prefixes of another pass, gradients of the prefixes alone.

use super::{Checks, Input};
use crate::Result;
use crate::ops::attention::{AttentionShape, GradTargets, Gradients, Inputs, Qkv, Segment, Segments};
use candle_core::{DType, Tensor};
use std::ops::Range;

/// (heads, key and value heads, head size): odd ones, and Granite's sizes.
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 8),
    (3, 1, 10),
    (6, 3, 32),
    (2, 1, 40),
    (4, 2, 64),
    (3, 1, 80),
    (2, 1, 96),
    (4, 2, 128),
    (1, 1, 256),
];

/// Prefixes' lengths, and sequences (prefix, length).
type PackedLengths = (&'static [usize], &'static [(usize, usize)]);
const PACKINGS: [PackedLengths; 4] = [
    (&[1], &[(0, 1)]),
    (&[5], &[(0, 3), (0, 1), (0, 123)]),
    (&[123, 4], &[(0, 40), (0, 13), (0, 70), (1, 2), (1, 90)]),
    (&[7], &[]),
];

/// The inputs of a case in one form.
struct InputForm {
    qkv: Qkv,
    prefix: Option<Tensor>,
}

struct AttentionCase {
    shape: AttentionShape,
    segments: Segments,
    qkv: [Input; 2],
    split: bool,
    prefix: Option<Input>,
}

pub(super) fn check(checks: &mut Checks) -> Result<()> {
    for of in SHAPES {
        for packing in PACKINGS {
            one_pass(checks, of, packing)?;
        }
        some_queries(checks, of)?;
        another_pass(checks, of)?;
    }
    Ok(())
}

fn one_pass(
    checks: &mut Checks,
    of: (usize, usize, usize),
    (prefixes, sequences): PackedLengths,
) -> Result<()> {
    let shape = shape(of);
    checks.case(format!("heads {of:?}, prefixes {prefixes:?}, sequences {sequences:?}"));
    let segments = packed(prefixes, sequences);
    let rows = segments.last().map_or(0, |s| s.keys.end);
    let fused = checks.random((rows, shape.q_width() + shape.kv_width()), 1.0)?;
    let none = checks.random((1, 1), 1.0)?;
    compare(
        checks,
        &AttentionCase { shape, segments: segments.into(), qkv: [fused, none], split: false, prefix: None },
    )
}

fn some_queries(checks: &mut Checks, of: (usize, usize, usize)) -> Result<()> {
    let shape = shape(of);
    checks.case(format!("heads {of:?}, queries of some rows"));
    let mut segments = packed(&[9, 5], &[(0, 6), (0, 3), (1, 150)]);
    let mut next = 0;
    for (segment, queries) in segments.iter_mut().zip([0, 0, 2, 3, 140]) {
        segment.first = segment.keys.len() - queries;
        segment.queries = next..next + queries;
        next += queries;
    }
    let (q, kv) =
        (checks.random((next, shape.q_width()), 1.0)?, checks.random((173, shape.kv_width()), 1.0)?);
    compare(
        checks,
        &AttentionCase { shape, segments: segments.into(), qkv: [q, kv], split: true, prefix: None },
    )
}

fn another_pass(checks: &mut Checks, of: (usize, usize, usize)) -> Result<()> {
    let shape = shape(of);
    let moved = |rows: &Range<usize>| rows.start - 75..rows.end - 75;
    let segments: Segments = packed(&[70, 5], &[(0, 6), (0, 3), (1, 15)])
        .into_iter()
        .skip(2)
        .map(|s| Segment { queries: moved(&s.queries), keys: moved(&s.keys), ..s })
        .collect();
    for extra in [0, shape.q_width()] {
        checks.case(format!("heads {of:?}, prefixes of another pass with {extra} other columns"));
        let fused = checks.random((24, shape.q_width() + shape.kv_width()), 1.0)?;
        let prefix = checks.random((75, shape.kv_width() + extra), 1.0)?;
        let none = checks.random((1, 1), 1.0)?;
        let case = AttentionCase {
            shape,
            segments: segments.clone(),
            qkv: [fused, none],
            split: false,
            prefix: Some(prefix),
        };
        compare(checks, &case)?;
    }
    Ok(())
}

fn compare(checks: &mut Checks, case: &AttentionCase) -> Result<()> {
    let shape = &case.shape;
    let (device, cpu, exact) = (case.form(|i| &i.device), case.form(|i| &i.cpu), case.form(|i| &i.exact));
    let ours = checks.run(|| shape.forward(case.inputs(&device)))?;
    let expected = shape.forward(case.inputs(&exact))?;
    let naive = shape.reference(case.inputs(&cpu))?;
    checks.value("out", &ours.out, &expected.out, &naive.out)?;
    checks.value("lse", &ours.lse, &expected.lse, &expected.lse.to_dtype(DType::F32)?)?;
    let dout = checks.random(ours.out.dims2()?, 1.0)?;
    let (ours, expected) = (ours.saved(), expected.saved());
    for needs in [GradTargets::All, GradTargets::Prefixes] {
        let found = checks.run(|| shape.backward(case.inputs(&device), &ours, &dout.device, needs))?;
        let exact = shape.backward(case.inputs(&exact), &expected, &dout.exact, needs)?;
        let naive = shape.reference_backward(case.inputs(&cpu), &dout.cpu, needs)?;
        gradients(checks, &found, &exact, &naive)?;
    }
    Ok(())
}

fn gradients(checks: &mut Checks, ours: &Gradients, exact: &Gradients, naive: &Gradients) -> Result<()> {
    if let (Some(a), Some(b), Some(c)) = (&ours.qkv, &exact.qkv, &naive.qkv) {
        checks.gradient("dq", a.queries(), b.queries(), c.queries())?;
        checks.gradient("dkv", a.keys_values(), b.keys_values(), c.keys_values())?;
    }
    if let (Some(a), Some(b), Some(c)) = (&ours.prefix, &exact.prefix, &naive.prefix) {
        checks.gradient("dprefix", a, b, c)?;
    }
    let same = ours.qkv.is_some() == exact.qkv.is_some() && ours.prefix.is_some() == exact.prefix.is_some();
    if same { Ok(()) } else { Err(crate::Error::Invalid("attention: another set of gradients".into())) }
}

impl AttentionCase {
    fn form(&self, of: fn(&Input) -> &Tensor) -> InputForm {
        let qkv = match self.split {
            true => Qkv::Split { q: of(&self.qkv[0]).clone(), kv: of(&self.qkv[1]).clone() },
            false => Qkv::Fused(of(&self.qkv[0]).clone()),
        };
        InputForm { qkv, prefix: self.prefix.as_ref().map(|p| of(p).clone()) }
    }

    fn inputs<'a>(&'a self, form: &'a InputForm) -> Inputs<'a> {
        Inputs { segments: &self.segments, qkv: &form.qkv, prefix: form.prefix.as_ref() }
    }
}

fn shape((heads, kv_heads, head_dim): (usize, usize, usize)) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f64).sqrt() }
}

/// Prefixes of the given lengths, then sequences, packed in one matrix.
pub(crate) fn packed(prefixes: &[usize], sequences: &[(usize, usize)]) -> Vec<Segment> {
    let (mut segments, mut row) = (Vec::new(), 0);
    let mut ranges = Vec::new();
    let own = |rows: Range<usize>, prefix| Segment { queries: rows.clone(), keys: rows, first: 0, prefix };
    for n in prefixes {
        ranges.push(row..row + n);
        segments.push(own(row..row + n, None));
        row += n;
    }
    for (prefix, n) in sequences {
        segments.push(own(row..row + n, Some(ranges[*prefix].clone())));
        row += n;
    }
    segments
}
