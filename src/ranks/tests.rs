//! Ranks as threads: order, agreement, ends.

use super::*;

#[test]
fn gather_is_in_rank_order_on_the_first_alone() {
    let all = Threads::run(4, |ranks| ranks.gather(vec![ranks.rank() as u8; ranks.rank()]).unwrap());
    assert_eq!(all[0], [vec![], vec![1], vec![2, 2], vec![3, 3, 3]]);
    assert!(all[1..].iter().all(Vec::is_empty));
    let sent = Threads::run(3, |ranks| ranks.broadcast(vec![ranks.rank() as u8 + 7]).unwrap());
    assert_eq!(sent, [[7], [7], [7]]);
    assert_eq!(Alone.gather(vec![1]).unwrap(), [[1]]);
    assert_eq!(Alone.broadcast(vec![1]).unwrap(), [1]);
}

#[test]
fn any_and_min_are_the_same_on_all_ranks() {
    for size in [1, 2, 5] {
        let last = size - 1;
        assert_eq!(Threads::run(size, |ranks| ranks.any(ranks.rank() == last).unwrap()), vec![true; size]);
        assert_eq!(Threads::run(size, |ranks| ranks.any(false).unwrap()), vec![false; size]);
        assert_eq!(Threads::run(size, |ranks| ranks.min(40 - ranks.rank()).unwrap()), vec![40 - last; size]);
    }
}

#[test]
fn combine_gives_all_ranks_what_the_first_makes() {
    let all =
        Threads::run(3, |ranks| ranks.combine(Ok(vec![ranks.rank() as u8]), |all| Ok(all.concat())).unwrap());
    assert_eq!(all, vec![vec![0, 1, 2]; 3]);
}

#[test]
fn combine_names_the_ranks_that_failed() {
    let invalid = |text: &str| Error::Invalid(text.into());
    let messages = Threads::run(4, |ranks| {
        let own = if ranks.rank() % 2 == 1 { Err(invalid("no file")) } else { Ok(Vec::new()) };
        ranks.combine(own, |_| unreachable!("a rank failed")).unwrap_err()
    });
    for error in messages {
        assert_eq!(error.to_string(), "ranks 1, 3: no file");
        assert!(error.is_bad_input());
    }
    // All have the same problem: it is no matter of ranks.
    let same = Threads::run(2, |ranks| ranks.all::<()>(Err(invalid("no key"))).unwrap_err().to_string());
    assert_eq!(same, ["no key", "no key"]);
    let of_first =
        Threads::run(2, |ranks| ranks.combine(Ok(Vec::new()), |_| Err(invalid("a full disk"))).unwrap_err());
    assert!(of_first.iter().all(|error| error.to_string() == "a full disk"), "{of_first:?}");
}

#[test]
fn combine_is_out_of_memory_unless_a_rank_failed_otherwise() {
    let short = || Error::OutOfMemory { problem: "no room".into() };
    let errors = Threads::run(3, |ranks| {
        let own = if ranks.rank() == 2 { Err(short()) } else { Ok(Vec::new()) };
        ranks.combine(own, |_| unreachable!("a rank failed")).unwrap_err()
    });
    for error in errors {
        assert!(
            matches!(&error, Error::OutOfMemory { problem } if problem == "rank 2: no room"),
            "{error:?}"
        );
    }
    let errors = Threads::run(3, |ranks| {
        let own = match ranks.rank() {
            1 => Err(Error::Shape { op: "linear", expected: "a".into(), found: "b".into() }),
            _ => Err(short()),
        };
        ranks.all::<()>(own).unwrap_err()
    });
    for error in errors {
        assert_eq!(error.to_string(), "rank 1: linear: expected a, found b");
        assert!(matches!(error, Error::Ranks { is_bad_input: false, .. }), "{error:?}");
    }
}

#[test]
fn a_rank_that_ends_ends_those_that_wait_for_it() {
    let outcomes = Threads::run(3, |ranks| match ranks.rank() {
        1 => Ok(false),
        _ => ranks.any(true),
    });
    assert!(outcomes[1].is_ok());
    let problem = |rank: usize| outcomes[rank].as_ref().unwrap_err().to_string();
    assert_eq!(problem(0), "rank 1 has ended");
    assert_eq!(problem(2), "rank 0 has ended");
}
