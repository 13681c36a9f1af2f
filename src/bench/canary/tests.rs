use super::*;
use std::collections::VecDeque;

/// Readings of a list, one after another.
struct Given(VecDeque<Reading>);

impl RateSource for Given {
    fn read(&mut self) -> Reading {
        self.0.pop_front().expect("a reading that was given")
    }
}

fn rates(rates: &[f64]) -> Reading {
    Reading { rates: rates.to_vec(), waited: Vec::new() }
}

/// A canary that has taken all `readings`.
fn canary(readings: &[Reading]) -> Canary {
    let canary = Canary::from_source(Box::new(Given(readings.iter().cloned().collect())));
    for reading in readings {
        assert_eq!(canary.read(), *reading);
    }
    canary
}

#[test]
fn select_leaves_out_the_steps_on_both_sides_of_a_slow_reading() {
    // The third reading has a thread at 79, the last one at 80 of the fastest, 100.
    let readings = [[100.0, 99.0], [90.0, 85.0], [95.0, 79.0], [96.0, 95.0], [90.0, 91.0], [80.0, 81.0]];
    let readings = readings.map(|pair| rates(&pair));
    let selection = canary(&readings).select(&readings, &[1.0; 5]);
    assert_eq!(selection, Selection { used: vec![true, false, false, true, true], disturbed: 2 });
}

#[test]
fn is_quiet_asks_every_thread_and_both_readings() {
    let (fast, slow) = (rates(&[10.0, 10.0, 10.0]), rates(&[10.0, 10.0, 7.9]));
    let canary = canary(&[fast.clone(), slow.clone()]);
    let quiet = |before, after| canary.is_quiet(before, after, 1.0);
    assert_eq!([quiet(&fast, &fast), quiet(&fast, &slow), quiet(&slow, &fast)], [true, false, false]);
}

#[test]
fn a_faster_reading_later_makes_earlier_ones_slow() {
    let (early, late) = (rates(&[10.0, 10.0]), rates(&[13.0, 12.9]));
    let quiet = |readings: &[Reading]| canary(readings).is_quiet(&early, &early, 1.0);
    assert!(quiet(std::slice::from_ref(&early)));
    assert!(!quiet(&[early.clone(), late]));
}

#[test]
fn fastest_is_of_readings_whose_threads_ran_equally_fast() {
    // A thread at 19 whose neighbour was stopped.
    let readings = [rates(&[10.0, 9.5]), rates(&[19.0, 1.0])];
    let canary = canary(&readings);
    assert_eq!((canary.rate().flops_per_second, canary.was_even()), (10.0, true));
    assert!(canary.is_quiet(&readings[0], &readings[0], 1.0));
}

#[test]
fn no_step_is_quiet_if_threads_never_run_equally_fast() {
    let readings = [rates(&[10.0, 7.9]), rates(&[10.1, 7.0])];
    let canary = canary(&readings);
    assert_eq!((canary.rate().flops_per_second, canary.was_even()), (10.1, false));
    assert_eq!(canary.select(&readings, &[1.0]).disturbed, 1);
}

#[test]
fn a_step_between_readings_without_rates_is_disturbed() {
    for reading in [rates(&[0.0, 0.0]), rates(&[])] {
        let canary = canary(&[reading.clone(), reading.clone()]);
        assert!(!canary.is_quiet(&reading, &reading, 1.0));
        let seen = canary.seen(&[reading.clone(), reading], &[1.0]).unwrap();
        assert_eq!(seen, CanarySeen { lowest: 0.0, median: 0.0, waiting: None });
    }
}

#[test]
fn a_thread_that_waited_for_a_core_disturbs_the_step() {
    let reading = |waited: [f64; 2]| Reading { rates: vec![10.0, 10.0], waited: waited.to_vec() };
    let readings = [reading([5.0, 0.0]), reading([5.19, 0.0]), reading([5.2, 0.21])];
    let canary = canary(&readings);
    // Of 2 s, 0.2 s are allowed.
    assert!(canary.is_quiet(&readings[0], &readings[1], 2.0));
    assert!(!canary.is_quiet(&readings[1], &readings[2], 2.0));
    let seen = canary.seen(&readings, &[2.0, 2.0]).unwrap();
    assert!((seen.waiting.unwrap() - 0.21 / 4.0).abs() < 1e-12, "{seen:?}");
}

#[test]
fn seen_is_of_the_slowest_thread() {
    let readings = [rates(&[10.0, 9.0]), rates(&[4.0, 9.0]), rates(&[7.0, 8.0]), rates(&[10.0, 10.0])];
    let seen = canary(&readings).seen(&readings, &[1.0; 3]).unwrap();
    // 0.4, 0.7, 0.9, 1.0.
    assert!((seen.lowest - 0.4).abs() < 1e-12 && (seen.median - 0.8).abs() < 1e-12, "{seen:?}");
    assert_eq!(canary(&readings).seen(&[], &[]), None);
}

#[test]
fn selection_uses_all_steps_if_too_few_are_quiet() {
    for (quiet, steps, enough) in [
        (10, 10, true),
        (4, 10, true),
        // Less than a third.
        (3, 10, false),
        (3, 9, true),
        (6, 19, false),
        (7, 20, true),
        // Fewer than three.
        (2, 3, false),
        (2, 2, false),
        (0, 5, false),
        (0, 0, false),
    ] {
        let list: Vec<bool> = (0..steps).map(|i| i < quiet).collect();
        let used = if enough { list.clone() } else { vec![true; steps] };
        assert_eq!(
            Selection::from_quiet(list),
            Selection { used, disturbed: steps - quiet },
            "{quiet} of {steps}"
        );
    }
}

#[test]
fn new_runs_the_products_of_the_dtype_on_every_thread() {
    let rate = Canary::new(DType::F32).rate();
    assert_eq!((rate.work, rate.threads, rate.quiet_share), ("gemm", rayon::current_num_threads(), 0.8));
    assert!(rate.flops_per_second.is_finite(), "{rate:?}");
}
