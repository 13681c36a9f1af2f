//! `gneiss check --large`: the ops at the sizes of real models, against plain ops on the same device.

use super::{Check, ops_table, text};
use candle_core::{DType, Device};
use gneiss::check::large::{NotRun, STEP};
use gneiss::check::{self, CheckTarget, Comparison, OPS};

/// The results in one dtype.
#[derive(serde::Serialize)]
struct LargeDtypeResults {
    dtype: &'static str,
    comparisons: Vec<Comparison>,
    not_run: Vec<NotRun>,
}

/// Runs the checks of `check` in these dtypes. Exit code 1 if a difference is larger than allowed, or if nothing was
/// run.
pub(super) fn run(check: &Check, device: &Device, dtypes: &[DType]) -> anyhow::Result<()> {
    let found = dtypes.iter().map(|d| one(check, device, *d)).collect::<anyhow::Result<Vec<_>>>()?;
    let all = || found.iter().flat_map(|f| &f.comparisons);
    let passed = all().filter(|c| c.holds()).count();
    let failed = all().count() - passed;
    let not_run: usize = found.iter().map(|f| f.not_run.len()).sum();
    if check.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        println!("device  {}, {}\n", gneiss::device::kind(device), gneiss::device::name(device));
        let names: Vec<&str> = OPS.into_iter().chain([STEP]).collect();
        let by_dtype: Vec<(&str, &[Comparison])> =
            found.iter().map(|f| (f.dtype, &f.comparisons[..])).collect();
        println!("{}\n", text::table(&ops_table(&names, &by_dtype)));
        for (of, NotRun { op, case, why }) in found.iter().flat_map(|f| f.not_run.iter().map(move |n| (f, n)))
        {
            println!("not run: {op} in {}, {case}: {why}", of.dtype);
        }
        for (of, wrong) in found.iter().flat_map(|f| f.comparisons.iter().map(move |c| (f, c))) {
            if !wrong.holds() {
                let Comparison { op, what, case, error, allowed } = wrong;
                println!(
                    "FAILED: {op} in {}, {what} of {case}: error {error:.3e}, allowed {allowed:.3e}",
                    of.dtype
                );
            }
        }
        let dtypes = found.iter().map(|f| f.dtype).collect::<Vec<_>>().join(", ");
        println!("check --large in {dtypes}: {passed} passed, {failed} failed, {not_run} not run");
    }
    if failed > 0 {
        anyhow::bail!("{failed} comparisons with plain ops on the same device do not hold");
    }
    if passed == 0 {
        anyhow::bail!("expected comparisons, found none: no case fits into the device's memory");
    }
    Ok(())
}

fn one(check: &Check, device: &Device, dtype: DType) -> anyhow::Result<LargeDtypeResults> {
    let target = CheckTarget { device, dtype, run: &|f: &mut dyn FnMut()| f() };
    let names: Vec<&str> = match &check.op[..] {
        [] => OPS.into_iter().chain([STEP]).collect(),
        some => some.iter().map(String::as_str).collect(),
    };
    let mut found = LargeDtypeResults { dtype: dtype.as_str(), comparisons: Vec::new(), not_run: Vec::new() };
    for name in names {
        status!("{:<5} {name}", dtype.as_str());
        let of = check::large(&target, name, check.scale)?;
        found.comparisons.extend(of.comparisons);
        found.not_run.extend(of.not_run);
    }
    Ok(found)
}
