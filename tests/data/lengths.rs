use gneiss::data::LengthStats;
use proptest::prelude::*;

#[test]
fn of_nothing() {
    let stats = LengthStats::from_lengths([].into_iter());
    assert_eq!(stats.to_string(), "0 sequences: min 0, median 0, mean 0.0, p95 0, max 0");
}

#[test]
fn of_one_length() {
    let stats = LengthStats::from_lengths([7, 7, 7].into_iter());
    assert_eq!((stats.min, stats.median, stats.mean, stats.p95, stats.max), (7, 7.0, 7.0, 7, 7));
    assert_eq!(stats.bins, [(7, 7, 3)]);
}

#[test]
fn of_a_hundred() {
    let stats = LengthStats::from_lengths((1..=100).rev());
    assert_eq!((stats.min, stats.median, stats.mean, stats.p95, stats.max), (1, 50.5, 50.5, 95, 100));
}

#[test]
fn draws_a_histogram() {
    let stats = LengthStats::from_lengths([4, 4, 5, 5, 5, 6, 9, 21].into_iter());
    let bar = |n: usize| format!("{:<40}", "#".repeat(n));
    let expected = [
        "8 sequences: min 4, median 5, mean 7.4, p95 21, max 21".to_string(),
        format!(" 4- 6 {} 6", bar(40)),
        format!(" 7- 9 {} 1", bar(7)),
        format!("10-12 {} 0", bar(0)),
        format!("13-15 {} 0", bar(0)),
        format!("16-18 {} 0", bar(0)),
        format!("19-21 {} 1", bar(7)),
    ];
    assert_eq!(stats.to_string(), expected.join("\n"));
}

proptest! {
    #[test]
    fn bins_hold_every_length_once(lengths in prop::collection::vec(0usize..300, 1..60)) {
        let stats = LengthStats::from_lengths(lengths.iter().copied());
        prop_assert!(stats.bins.len() <= 8);
        prop_assert_eq!(stats.bins[0].0, stats.min);
        prop_assert_eq!(stats.bins.last().unwrap().1, stats.max);
        for pair in stats.bins.windows(2) {
            prop_assert_eq!(pair[0].1 + 1, pair[1].0);
        }
        for (first, last, count) in &stats.bins {
            prop_assert_eq!(lengths.iter().filter(|l| (first..=last).contains(l)).count(), *count);
        }
        let within = |limit| lengths.iter().filter(|l| **l <= limit).count() * 100;
        prop_assert!(within(stats.p95) >= lengths.len() * 95);
        prop_assert!(stats.p95 == 0 || within(stats.p95 - 1) < lengths.len() * 95);
    }
}
